"""Model files are told by their content, and damage is noticed before a job is made of it."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import pytest
import torch

from service.jobs.errors import (
    ArchitectureMissingError,
    ModelInvalidError,
    ModelRefusedError,
    ServiceError,
)
from service.jobs.model_files import check_model


def check(data: bytes, architecture: str | None = "resnet18") -> str:
    return check_model(io.BytesIO(data), len(data), architecture)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_sound_files(onnx_model: bytes, state_dict: bytes) -> None:
    assert check(onnx_model, None) == "onnx"
    assert check(state_dict) == "safetensors"
    assert check(saved({"fc.weight": torch.ones(2)})) == "pth"


def test_state_dict_needs_its_network_named(state_dict: bytes) -> None:
    for data in (state_dict, saved({"w": torch.ones(1)})):
        with pytest.raises(ArchitectureMissingError, match=r"config\.architecture"):
            check(data, None)


def test_onnx_is_its_own_network(onnx_model: bytes) -> None:
    with pytest.raises(ModelInvalidError, match=r"config\.architecture names .*'resnet18'"):
        check(onnx_model, "resnet18")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (zipped("net/code/a.py", "net/data.pkl", "net/constants.pkl"), "TorchScript"),
        (zipped("net/models/model.json", "net/archive_format"), "torch.export"),
        (pickle.dumps([1]), "pickle"),
    ],
)
def test_what_runs_code_when_read_is_refused_with_the_way_out(data: bytes, word: str) -> None:
    with pytest.raises(ModelRefusedError, match=word) as caught:
        check(data)
    assert "torch.onnx.export" in caught.value.remedy


def test_real_export_archive_is_refused() -> None:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), buffer)
    with pytest.raises(ModelRefusedError, match=r"pt2"):
        check(buffer.getvalue())


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
def test_a_cut_is_noticed_anywhere(onnx_model: bytes, state_dict: bytes, keep: float) -> None:
    for data in (onnx_model, state_dict, saved({"w": torch.ones(1000)})):
        with pytest.raises(ModelInvalidError):
            check(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is no model",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\x00" * 64,
        bytes([0xFF]) * 64,
        b"\x08\x07",  # ir_version alone: a message, but no graph
        b"PK\x03\x04" + bytes(60),
        zipped("readme.txt"),
        safetensors({}),
        safetensors([]),
        safetensors({"w": 3}),
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        safetensors({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}),
        safetensors({"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(5)),
        safetensors({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(4)),
        struct.pack("<Q", 50) + b"{" + b" " * 10,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
    ],
)
def test_what_is_no_model_is_a_named_error(data: bytes) -> None:
    with pytest.raises(ServiceError):
        check(data)
