"""docs/checkpoint.md is true: its example is what is written, byte by byte, and its reader reads every checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aquant_core import checkpoint, load
from aquant_core.checkpoint import read, write
from aquant_core.encoding import encode_border, pack_codes
from aquant_core.graph import ELEMENTWISE, OPERATORS
from cupy_kernels import specification

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text()
FIXTURES = sorted((Path(__file__).parent / "checkpoints").glob("format-2-*.safetensors"))
COEFFICIENTS = np.array([[[0.5, 0, -0.25, 0]], [[0, 1, 0, 0]], [[0, 0, 0, 2]]], np.float32)


def block(language: str) -> str:
    """The page's code block in that language; of those in none, the one with bytes."""
    found = [text for name, text in re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL) if name == language]
    assert len(found) == 1
    return found[0]


def written(path: Path, bits: int) -> bytes:
    """The example's file as this version writes it."""
    stored, steps = encode_border(COEFFICIENTS, None, bits)
    square = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    nodes = [["conv", "conv2d", ["input"], square], ["out", "flatten", ["conv"], {"start_dim": 1}]]
    document = {
        "graph": {"nodes": nodes, "input_shape": [1, 2, 2]},
        "layers": [["conv", 2, 3, 0, [1, 1, 2, 2], True, *steps]],
        "quantizers": [],
        "a_rounding": False,
        "border": {
            "form": "quadratic", "bound": "steep", "fusion": "none", "alpha": "fixed", "granularity": "position",
            "input_gradient": True, "bits": bits,
        },
    }  # fmt: skip
    tensors = {
        "conv.weight": pack_codes(np.array([1, 2, 3, 0]), 2),
        "conv.weight_scale": np.array([0.5], np.float32),
        "conv.weight_zero_point": np.array([1], np.uint8),
        "conv.bias": np.array([0.25], np.float32),
        "conv.input_scale": np.array([0.125], np.float32),
        "conv.border": stored["border"],
    }
    write(path, document, tensors)
    return path.read_bytes()


def test_the_example_is_what_is_written(tmp_path: Path) -> None:
    header = block("json").rstrip("\n").encode()
    length = len(header) + -len(header) % 8
    assert f"The header is {length} bytes" in PAGE
    data = bytes.fromhex(block(""))
    assert f"{len(data)} bytes of tensors" in PAGE
    content = length.to_bytes(8, "little") + header.ljust(length) + data
    assert written(tmp_path / "q.safetensors", 16) == content
    assert load(tmp_path / "q.safetensors").layers["conv"].weight().flatten().tolist() == [0.0, 0.5, 1.0, -0.5]


def test_the_example_in_8_bits(tmp_path: Path) -> None:
    content = written(tmp_path / "q.safetensors", 8)
    border = re.findall(r"the bytes `([\da-f ]+)`, `([\da-f ]+)`, `([\da-f ]+)`", PAGE)[0]
    assert bytes.fromhex("".join(border)) in content
    steps = re.findall(r"its steps, (\S+), (\S+) and (\S+):", PAGE)[0]
    assert [float(step) for step in steps] == read(tmp_path / "q.safetensors").document["layers"][0][6:]
    assert np.abs(read(tmp_path / "q.safetensors").layers["conv"].border - COEFFICIENTS).max() < 0.004


@pytest.fixture(scope="module")
def reader() -> Callable[[Path], Any]:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    return names["read"]


@pytest.mark.parametrize("source", FIXTURES, ids=lambda path: path.stem)
def test_the_page_s_reader_reads_what_this_one_does(source: Path, reader: Callable[[Path], Any]) -> None:
    stored = read(source)
    document, layers = reader(source)
    assert document == stored.document
    assert list(layers) == list(stored.layers)
    for name, row in stored.layers.items():
        found = layers[name]
        assert np.array_equal(np.array(found["weight"], np.float32), row.dequantized_weight().ravel())
        for kind in ("bias", "border", "alpha"):
            tensor = getattr(row, kind)
            assert (kind in found) == (tensor is not None)
            if tensor is not None:
                assert np.array_equal(np.array(found[kind], np.float32), tensor.ravel())
        assert found.get("input_scale") == row.input_scale
        assert found["zero_point"] == row.zero_point


def test_the_page_s_reader_sees_damage(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    content = FIXTURES[0].read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content.replace(rb"\"seed\":0", rb"\"seed\":1")):
        assert damaged != content
        (tmp_path / "q").write_bytes(damaged)
        with pytest.raises(AssertionError):
            reader(tmp_path / "q")


def test_versions_constants_and_operators_are_named() -> None:
    assert f"Format version: `{checkpoint.FORMAT}`" in PAGE
    assert f"| `{checkpoint.UNVERIFIED_FORMAT}` |" in PAGE
    for name in ("P0", "P1", "P2", "Q1", "Q2"):
        assert f"{name.lower()} = {getattr(specification, f'SIGMOID_{name}')!r}" in PAGE
    assert f"clipped to [-{specification.SIGMOID_LIMIT:.0f}, {specification.SIGMOID_LIMIT:.0f}]" in PAGE
    table = PAGE[PAGE.index("| op | ") : PAGE.index("## What a layer computes")]
    assert set(re.findall(r"`(\w+)`", table)) >= OPERATORS.keys() | ELEMENTWISE
