"""The checkpoint file by itself: read without torch, verified, and refused with the name of what is damaged."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uploads
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from aquant_core import checkpoint, load
from aquant_core.checkpoint import Checkpoint, read, write
from aquant_core.config import FLOAT_BITS
from aquant_core.encoding import pack_codes
from aquant_core.errors import CheckpointError

FOLDER = Path(__file__).parent / "checkpoints"
BORDER, OUTPUTS, EIGHT_BITS = (
    FOLDER / f"format-2-{name}.safetensors" for name in ("border", "outputs", "border_8_bit")
)
OLD = FOLDER / "format-1-border.safetensors"
READERS: list[Callable[[Path], Any]] = [read, load]


def header_of(content: bytes) -> tuple[int, dict[str, Any]]:
    """Bytes of the header, and the header."""
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def rewrite(source: Path, target: Path, tensors: dict[str, np.ndarray], **document: Any) -> Path:
    """With valid digests, so that what is wrong is found by what it means."""
    write(target, read(source).document | document, tensors)
    return target


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints say the same."""
    return repr(one) == repr(other)  # arrays are small


def test_reading_needs_numpy_and_safetensors_alone() -> None:
    program = (
        "import sys; before = set(sys.modules); from aquant_core.checkpoint import read\n"
        f"stored = read({str(EIGHT_BITS)!r}); assert stored.layers['depthwise'].border.shape == (3, 6, 9)\n"
        "found = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(*sorted(name for name in found if not name.startswith('_')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["aquant_core", "numpy", "safetensors"]


def test_what_is_read() -> None:
    stored = read(BORDER)
    assert list(stored.layers) == ["stem", "depthwise", "pointwise", "fc"]
    assert stored.values == {}
    assert set(stored.about) == {"config", "seed", "protocol", "versions", "digests"}
    assert stored.constants["mul.constant"].ravel().tolist() == [0.5, -0.25, 0.125, 0.0, 1.0, -0.5]
    layer = stored.layers["pointwise"]
    assert (layer.weight_bits, layer.activation_bits, layer.zero_point) == (5, 3, 0)
    assert (layer.weight.shape, layer.weight.dtype, int(layer.weight.max())) == ((6, 6, 1, 1), np.uint8, 31)
    assert layer.bias is None
    assert layer.alpha is None
    assert layer.dequantized_weight().dtype == np.float32
    outputs = read(OUTPUTS)
    assert {name: value.bits for name, value in outputs.values.items()} == {
        "input.quantize": 8, "relu.quantize": 3, "relu_1.quantize": 3, "relu_2.quantize": 8,
    }  # fmt: skip
    float_layer = outputs.layers["depthwise"]
    assert (float_layer.weight_bits, float_layer.activation_bits) == (FLOAT_BITS, FLOAT_BITS)
    assert float_layer.weight.dtype == np.float32
    assert float_layer.dequantized_weight() is float_layer.weight
    assert float_layer.input_scale is None


def network(bits: int, codes: list[int], scale: float, zero_point: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Document and tensors of one linear layer with one output."""
    row = ["fc", bits, FLOAT_BITS, 0, [1, len(codes)], False]
    document = {
        "graph": {"nodes": [["fc", "linear", ["input"], {}]], "input_shape": [len(codes), None, None]},
        "layers": [row], "quantizers": [], "a_rounding": False, "border": None,
    }  # fmt: skip
    return document, {
        "fc.weight": pack_codes(np.array(codes), bits),
        "fc.weight_scale": np.array([scale], np.float32),
        "fc.weight_zero_point": np.array([zero_point], np.uint8),
    }


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40),
            st.floats(2.0**-20, 2.0**20, width=32),
            st.integers(0, 2**bits - 1),
        )
    )
)
def test_both_readers_find_the_same_codes(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[int, list[int], float, int]
) -> None:
    bits, codes, scale, zero_point = case
    path = tmp_path_factory.mktemp("packed") / "q.safetensors"
    write(path, *network(bits, codes, scale, zero_point))
    row, model = read(path).layers["fc"], load(path)
    assert row.weight.tolist() == [codes]
    assert row.dequantized_weight().tolist() == [[np.float32(scale) * (code - zero_point) for code in codes]]
    assert model.layers["fc"].weight.codes.tolist() == [codes]
    assert np.array_equal(model.layers["fc"].weight().numpy(), row.dequantized_weight())


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for source in (BORDER, OUTPUTS, EIGHT_BITS):
        again = rewrite(source, tmp_path / "q.safetensors", load_file(source))
        assert again.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("reader", READERS, ids=["numpy", "torch"])
@pytest.mark.parametrize("source", [BORDER, OUTPUTS, EIGHT_BITS], ids=lambda path: path.stem)
def test_a_tensor_with_any_bit_flipped_is_named(source: Path, reader: Callable[[Path], Any], tmp_path: Path) -> None:
    content, draw, damaged = source.read_bytes(), random.Random(0), tmp_path / "q.safetensors"
    length, header = header_of(content)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, end = entry["data_offsets"]
        changed = bytearray(content)
        changed[8 + length + draw.randrange(first, end)] ^= 1 << draw.randrange(8)
        damaged.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"Tensor '{name}' and its digest disagree"):
            reader(damaged)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_flipped_is_refused_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source = data.draw(st.sampled_from([BORDER, OUTPUTS, EIGHT_BITS]))
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path_factory.mktemp("damaged") / "q.safetensors"
    damaged.write_bytes(content)
    try:
        found = read(damaged)
    except CheckpointError:
        with pytest.raises(CheckpointError):
            load(damaged)
    else:
        assert same(found, read(source))


def test_any_byte_of_the_header_flipped_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    content, draw, damaged = BORDER.read_bytes(), random.Random(0), tmp_path / "q.safetensors"
    length, _ = header_of(content)
    intact, accepted = read(BORDER), []
    for place in range(8 + length):
        changed = bytearray(content)
        changed[place] = draw.choice([byte for byte in b'0123456789"[]{},:anul ' if byte != changed[place]])
        damaged.write_bytes(changed)
        try:
            found = read(damaged)
        except CheckpointError:
            continue
        assert same(found, intact), place
        accepted.append(place)
    assert accepted == []


@pytest.mark.parametrize("source", [BORDER, OLD], ids=lambda path: path.stem)
def test_a_truncated_file_is_refused_with_the_first_tensor_that_is_cut_off(source: Path, tmp_path: Path) -> None:
    content, damaged = source.read_bytes(), tmp_path / "q.safetensors"
    length, header = header_of(content)
    ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__")
    for kept in (*range(0, 8 + length, 97), *range(8 + length, len(content))):
        damaged.write_bytes(content[:kept])
        cut_off = next(name for end, name in ends if end > kept - 8 - length) if kept >= 8 + length else None
        why = "cannot be read" if cut_off is None else f"cannot be read: it ends before tensor '{cut_off}' does"
        with pytest.raises(CheckpointError, match=why):
            read(damaged)
    with pytest.raises(CheckpointError, match=f"it ends before tensor '{ends[-1][1]}' does"):
        load(damaged)


def test_a_network_in_place_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    network = tmp_path / "model.onnx"
    network.write_bytes(uploads.onnx_model())
    with pytest.raises(CheckpointError, match=r"no checkpoint, it looks like ONNX\. Give what `aquant quantize`"):
        read(network)


def test_a_document_nested_without_end_is_told_in_words(tmp_path: Path) -> None:
    deep = tmp_path / "q.safetensors"
    save_file({"w": np.zeros(1, np.float32)}, deep, {"aquant": "[" * 200_000})
    with pytest.raises(CheckpointError, match="its document is nested too deeply"):
        read(deep)


def test_a_longer_file_is_refused(tmp_path: Path) -> None:
    longer = tmp_path / "q.safetensors"
    longer.write_bytes(BORDER.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(longer)


@pytest.mark.parametrize("reader", READERS, ids=["numpy", "torch"])
@pytest.mark.parametrize("source", [BORDER, EIGHT_BITS, OUTPUTS, OLD], ids=lambda path: path.stem)
def test_a_missing_tensor_is_named(source: Path, reader: Callable[[Path], Any], tmp_path: Path) -> None:
    tensors, document = load_file(source), read(source).document
    for name in tensors:
        if name == "mul.constant":
            continue
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        for signed in (True, False):
            path = tmp_path / "q.safetensors"
            if signed:
                write(path, document, others)
            else:  # its digests are still those of all
                save_file(others, path, {"aquant": json.dumps(document, separators=(",", ":"), sort_keys=True)})
            with pytest.raises(CheckpointError, match=f"Tensor '{name}' is missing"):
                reader(path)


def test_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    tensors, text = load_file(BORDER), header_of(BORDER.read_bytes())[1]["__metadata__"]["aquant"]
    path = tmp_path / "q.safetensors"
    save_file(tensors | {"mul.other": tensors["fc.bias"]}, path, {"aquant": text})
    with pytest.raises(CheckpointError, match="It holds 27 tensors instead of 26"):
        read(path)


def test_tensors_that_changed_places_are_refused(tmp_path: Path) -> None:
    tensors, text = load_file(BORDER), header_of(BORDER.read_bytes())[1]["__metadata__"]["aquant"]
    tensors["stem.bias"], tensors["depthwise.bias"] = tensors["depthwise.bias"], tensors["stem.bias"]
    path = tmp_path / "q.safetensors"
    save_file(tensors, path, {"aquant": text})
    with pytest.raises(CheckpointError, match=r"Tensor 'depthwise\.bias' and its digest disagree"):
        read(path)


@pytest.mark.parametrize("name", ["stem.weight", "stem.border", "depthwise.alpha", "fc.bias", "fc.weight_scale"])
def test_a_tensor_of_another_shape_or_type_is_named(name: str, tmp_path: Path) -> None:
    tensors = load_file(BORDER)
    kind = tensors[name].dtype
    tensors[name] = np.zeros((2, 3), kind)
    with pytest.raises(CheckpointError, match=rf"Tensor '{name}' has shape \[2, 3\] instead of"):
        load(rewrite(BORDER, tmp_path / "q.safetensors", tensors))
    tensors[name] = load_file(BORDER)[name].view(np.int8 if kind == np.uint8 else np.float16)
    tensors[name] = np.resize(tensors[name].astype(np.int8), load_file(BORDER)[name].shape)
    with pytest.raises(CheckpointError, match=f"Tensor '{name}' is int8 instead of {kind}"):
        load(rewrite(BORDER, tmp_path / "q.safetensors", tensors))


@pytest.mark.parametrize("found", ["aquant-checkpoint/3", "aquant-checkpoint/10", "aquant-graph/1", None])
@pytest.mark.parametrize("reader", READERS, ids=["numpy", "torch"])
def test_another_format_is_named(found: str | None, reader: Callable[[Path], Any], tmp_path: Path) -> None:
    path, document = tmp_path / "q.safetensors", read(BORDER).document | {"format": found}
    save_file(load_file(BORDER), path, {"aquant": json.dumps(document)})
    with pytest.raises(CheckpointError, match=rf"format {found!r}; this version reads 'aquant-checkpoint/2' and .*/1'"):
        reader(path)


def test_a_new_file_cannot_pass_for_an_old_one(tmp_path: Path) -> None:
    tensors, document = load_file(BORDER), read(BORDER).document | {"format": checkpoint.UNVERIFIED_FORMAT}
    path = tmp_path / "q.safetensors"
    save_file(tensors, path, {"aquant": json.dumps(document, separators=(",", ":"), sort_keys=True)})
    with pytest.raises(CheckpointError, match="Its document and its digest disagree"):
        read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(CheckpointError):
        read(other)
    with pytest.raises(CheckpointError, match="is not a file"):
        read(tmp_path / "absent")
    save_file({"x": np.zeros(1, np.float32)}, other)
    with pytest.raises(CheckpointError, match="format None"):
        read(other)


@pytest.mark.parametrize("document", ["[]", "null", "3", "{", '"text"', "[" * 100_000])
def test_a_header_that_is_no_document_is_refused(tmp_path: Path, document: str) -> None:
    path = tmp_path / "q.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, path, {"aquant": document})
    with pytest.raises(CheckpointError):
        read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": [[]]},
        {"layers": None},
        {"layers": [["stem", "8", 8, 0, [6, 1, 3, 3], True]]},
        {"layers": [["stem", 8, 8, 0, 5, True]]},
        {"layers": [["stem", 99, 8, 0, [6, 1, 3, 3], True]]},
        {"layers": [["stem", 8, True, 0, [6, 1, 3, 3], True]]},
        {"layers": [["stem", 8, 8, 0, [6, 1, 3, 3], True, 0.5]]},
        {"quantizers": 3},
        {"quantizers": [["relu", 3, 0]]},
        {"quantizers": [["relu.quantize"]]},
        {"graph": {}},
        {"graph": None},
        {"graph": {"nodes": [[]], "input_shape": [1, 12, 12]}},
        {"border": {"form": "cubic"}},
        {"border": {"bits": 4, "form": "quadratic", "granularity": "position", "alpha": "fixed"}},
        {"border": [1]},
        {"border": "quadratic"},
    ],
    ids=str,
)
def test_a_document_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    damaged = rewrite(BORDER, tmp_path / "q.safetensors", load_file(BORDER), **changes)
    with pytest.raises(CheckpointError):
        load(damaged)


def test_an_old_file_s_damaged_header_never_raises_anything_else(tmp_path: Path) -> None:
    """It holds no digests, so that not everything is found."""
    content = OLD.read_bytes()
    length, _ = header_of(content)
    draw, damaged, refused = random.Random(0), tmp_path / "q.safetensors", 0
    for _ in range(150):
        changed = bytearray(content)
        changed[draw.randrange(8, 8 + length)] = draw.choice(b'0123456789"[]{},:anul')
        damaged.write_bytes(changed)
        try:
            load(damaged)
        except CheckpointError:
            refused += 1
    assert refused > 75
