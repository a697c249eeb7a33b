"""Uploads made to do harm, and the code that each must end with; the same bytes every time."""

from __future__ import annotations

import gzip
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import uploads
from hostile_files import (
    TERA,
    Payload,
    changed,
    classified,
    cyclic,
    encrypted,
    field_of,
    first_values,
    first_weight,
    flipped,
    folded,
    huge_storage,
    linked_zip,
    lying_directory,
    lying_directory_64,
    many_nodes,
    nested_branches,
    nested_messages,
    network,
    npy,
    npy_of,
    npy_of_objects,
    npz,
    outside,
    outside_in_a_branch,
    outside_in_a_constant,
    overlapping,
    pickled,
    pickled_module,
    png,
    safetensors_of,
    serialized,
    tar_entry,
    tarred,
    tensor,
    torch_archive,
    zipped,
)
from onnx import TensorProto, helper
from safetensors.numpy import save

Slot = Literal["model", "calibration", "evaluation", "config"]
PREPROCESS: dict[str, Any] = {"preprocess": {"size": 8, "crop": 8, "mean": [0.0], "std": [1.0]}}
RESNET: dict[str, Any] = {"architecture": "resnet18"}
IMAGES = np.random.default_rng(5).integers(0, 256, (64, 1, 8, 8)).astype(np.uint8)
LABELS = np.arange(64) % 10
SPOILT = (IMAGES / 255).astype(np.float32)
SPOILT[5, 0, 1, 1] = np.nan
PNG = png(8, 8)


@dataclass(frozen=True)
class Hostile:
    """One upload.

    Attributes:
        name: what it is.
        slot: the part of the form it is sent as; the other parts are sound.
        data: its bytes, given the path of a file that no payload in it may ever make.
        code: of the problem it must end with.
        config: what the job's configuration says besides.
        inside: whether it passes the door and fails in the worker's sandbox.
        payload: whether code is hidden in it.
        alike: one like it goes through the whole service; this one is for the readers alone.
    """

    name: str
    slot: Slot
    data: Callable[[Path], bytes]
    code: str
    config: dict[str, Any] = field(default_factory=dict)
    inside: bool = False
    payload: bool = False
    alike: bool = False


def fixed(data: bytes) -> Callable[[Path], bytes]:
    return lambda _: data


def corpus() -> Iterator[Hostile]:
    """All of them."""
    yield from _models()
    yield from _networks()
    yield from _state_dicts()
    yield from _arrays()
    yield from _archives()
    yield from _configurations()


def _models() -> Iterator[Hostile]:
    sound = uploads.onnx_model()
    weights = save({"fc.weight": np.ones((10, 4), np.float32)})

    def refuse(name: str, data: bytes | Callable[[Path], bytes], code: str = "model_invalid", **about: Any) -> Hostile:
        return Hostile(name, "model", fixed(data) if isinstance(data, bytes) else data, code, **about)

    for protocol in (2, 4):
        yield refuse(
            f"a pickle, protocol {protocol}",
            lambda marker, protocol=protocol: pickled(marker, protocol),
            "model_format_unsupported",
            payload=True,
        )
    yield refuse("a pickle in letters", lambda marker: pickled(marker, 0), payload=True)
    yield refuse(
        "TorchScript",
        lambda marker: torch_archive(pickled(marker), **{"constants.pkl": b"", "code/a.py": b"1"}),
        "model_format_unsupported",
        config=RESNET,
        payload=True,
    )
    yield refuse(
        "a torch.export archive", torch_archive(b"", archive_format=b"pt2"), "model_format_unsupported", config=RESNET
    )
    yield refuse("nothing", b"", "upload_empty")
    yield refuse("noise", np.random.default_rng(9).bytes(5000))
    yield refuse("a page", b"<!doctype html><script>fetch('http://127.0.0.1')</script>")
    yield refuse("a program", b"\x7fELF\x02\x01\x01" + bytes(100))
    yield refuse("a script", b"#!/bin/sh\nexit 1\n")
    yield refuse("a gzip file", gzip.compress(sound, mtime=0))
    yield refuse("a network cut short", sound[: len(sound) * 2 // 3])
    yield refuse(
        "a network that claims 2^60 bytes", field_of(8, b"\x10\x12") + b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x0f"
    )
    yield refuse("a network of a million parts", b"\x08\x0a" * 1_000_000)
    yield refuse("weights cut short", weights[:-7], config=RESNET)
    yield refuse("weights with a wrong bit in the header", flipped(weights, 0.1), config=RESNET)
    yield refuse("a header that claims a tebibyte", struct.pack("<Q", TERA) + weights[8:], config=RESNET)
    yield refuse("a header of 99 MB", struct.pack("<Q", 99_000_000) + weights[8:], config=RESNET)
    yield refuse("weights of a tebibyte", safetensors_of({"w": tensor([2**38], 0, TERA)}, b"1234"), config=RESNET)
    yield refuse("a shape whose size overflows", safetensors_of({"w": tensor([2**33, 2**33], 0, 0)}), config=RESNET)
    yield refuse("a shape beyond all numbers", safetensors_of({"w": tensor([10**400], 0, 4)}, b"1234"), config=RESNET)
    yield refuse("a negative shape", safetensors_of({"w": tensor([-1, -1], 0, 4)}, b"1234"), config=RESNET)
    yield refuse(
        "weights that overlap",
        safetensors_of({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
        config=RESNET,
    )
    yield refuse("an unknown type", safetensors_of({"w": tensor([1], 0, 8, "PYOBJECT")}, bytes(8)), config=RESNET)
    yield refuse(
        "one name twice",
        safetensors_of(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        config=RESNET,
    )
    yield refuse("a header nested without end", safetensors_of(b'{"w":' + b"[" * 100_000), config=RESNET)
    yield refuse("a state dict without its network", weights, "architecture_missing")
    yield refuse("a zip bomb", zipped({"archive/data.pkl": bytes(30_000_000)}, zipfile.ZIP_DEFLATED), config=RESNET)
    yield refuse("a zip bomb of entries that overlap", overlapping("data.pkl", bytes(10**6)), config=RESNET)
    yield refuse("a zip of a gigabyte of names", lying_directory(torch_archive(b"."), 2**30), config=RESNET)
    yield refuse("a zip64 of an exbibyte of names", lying_directory_64(torch_archive(b"."), 2**60), config=RESNET)
    yield refuse("an encrypted zip", encrypted(torch_archive(b".")), config=RESNET)
    yield refuse("a zip of something else", zipped({"readme.txt": b"hello"}), config=RESNET)


def _networks() -> Iterator[Hostile]:
    sound = uploads.onnx_model()

    def fails(name: str, data: bytes, code: str = "model_invalid", **about: Any) -> Hostile:
        return Hostile(name, "model", fixed(data), code, inside=True, **about)

    yield fails("a network with wrong bits", flipped(sound, 0.05, 0.12))
    yield fails("weights in a file of the machine", changed(outside))
    yield fails("a constant in a file of the machine", changed(outside_in_a_constant), alike=True)
    yield fails("weights of a branch in a file of the machine", changed(outside_in_a_branch), alike=True)
    yield fails("a cycle", changed(cyclic))
    yield fails("10,000 nodes", many_nodes(10_000))
    yield fails("NaN in the weights", changed(first_values(float("nan"))), "values_not_finite")
    yield fails("infinity in the weights", changed(first_values(float("inf"))), "values_not_finite", alike=True)
    yield fails("weights of strings", changed(first_weight(data_type=TensorProto.STRING)), alike=True)
    yield fails("a network of a tebibyte", changed(first_weight(dims=[2**20, 2**18, 1, 1])))
    yield fails("weights whose size overflows", changed(first_weight(dims=[2**33, 2**33, 1, 1])), alike=True)
    yield fails("a negative dimension", changed(first_weight(dims=[-4, 1, 3, 3])), alike=True)
    yield fails("weights of size zero", changed(first_weight(dims=[4, 1, 0, 3], raw_data=b"")), alike=True)
    yield fails(
        "images of doubles",
        serialized(network([helper.make_node("Relu", ["x"], ["y"])], kind=TensorProto.DOUBLE)),
        alike=True,
    )
    yield fails(
        "two values of one name",
        classified(helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Tanh", ["x"], ["a"]), source="a"),
        alike=True,
    )
    yield fails("branches within branches", nested_branches(12), "operator_unsupported")
    yield fails("messages within messages", nested_messages(5_000))
    yield fails(
        "an operator of another domain",
        classified(helper.make_node("PyOp", ["x"], ["a"], domain="ai.onnx.contrib", code="import os"), source="a"),
        "operator_unsupported",
        alike=True,
    )
    yield fails(
        "an operator of a megabyte's name",
        classified(helper.make_node("A" * 10**6, ["x"], ["a"]), source="a"),
        "operator_unsupported",
    )
    yield fails(
        "a constant of a tebibyte",
        folded("ConstantOfShape", shape=np.array([2**20, 2**18], np.int64)),
        "upload_too_large_for_memory",
    )
    yield fails(
        "padding of a tebibyte",
        classified(
            helper.make_node("Pad", ["x", "pads"], ["a"]),
            source="a",
            pads=np.array([0, 0, 2**18, 2**18, 0, 0, 2**18, 2**18], np.int64),
        ),
        "upload_too_large_for_memory",
    )
    convolution = {"w": np.ones((4, 1, 3, 3), np.float32)}
    yield fails(
        "a convolution in no groups",
        classified(helper.make_node("Conv", ["x", "w"], ["a"], group=0), source="a", **convolution),
    )
    yield fails(
        "a stride of zero",
        classified(helper.make_node("Conv", ["x", "w"], ["a"], strides=[0, 0]), source="a", **convolution),
        alike=True,
    )


def _state_dicts() -> Iterator[Hostile]:
    def fails(name: str, data: bytes | Callable[[Path], bytes], code: str = "model_invalid", **about: Any) -> Hostile:
        config = about.pop("config", RESNET)
        return Hostile(
            name, "model", fixed(data) if isinstance(data, bytes) else data, code, config, inside=True, **about
        )

    yield fails("a payload in a state dict", lambda marker: torch_archive(pickled(marker)), payload=True)
    yield fails(
        "a payload behind a state dict",
        lambda marker: torch_archive(pickle.dumps({"w": 1, "x": Payload(marker)}, 2)),
        payload=True,
        alike=True,
    )
    yield fails("a module", pickled_module())
    yield fails("weights that claim 8 GB", huge_storage())
    yield fails("weights of another network", save({"fc.weight": np.ones((10, 4))}), "weights_mismatch", alike=True)
    yield fails(
        "a network of a path's name",
        save({"w": np.ones(3, np.float32)}),
        "architecture_unknown",
        config={"architecture": "../../etc/passwd"},
        alike=True,
    )


def _arrays() -> Iterator[Hostile]:
    def refuse(name: str, data: bytes | Callable[[Path], bytes], slot: Slot = "calibration", **about: Any) -> Hostile:
        code = about.pop("code", "images_invalid")
        return Hostile(name, slot, fixed(data) if isinstance(data, bytes) else data, code, **about)

    def shaped(shape: str, descr: str = "|u1") -> str:
        return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"

    for slot in ("calibration", "evaluation"):
        yield refuse(f"a pickle as {slot}", pickled, slot, payload=True)
        yield refuse(f"an array of objects as {slot}", npy_of_objects, slot, payload=True)
        yield refuse(
            f"labels of objects as {slot}",
            lambda marker: zipped({"images.npy": npy(IMAGES), "labels.npy": npy_of_objects(marker)}),
            slot,
            payload=True,
        )
    yield refuse("a header of 4 GB", npy_of(shaped("(64, 1, 8, 8)"), bytes(4096), claimed=2**32 - 1, version=2))
    yield refuse("a header nested without end", npy_of("(" * 9_000))
    yield refuse("a header of signs", npy_of("-" * 9_000 + "1"))
    yield refuse("a header that computes", npy_of("__import__('os').system('exit 1')"))
    yield refuse("an array of a tebibyte", npy_of(shaped("(1048576, 1, 1024, 1024)"), bytes(4096)))
    yield refuse("a shape whose size overflows", npy_of(shaped("(4294967296, 4294967296, 1, 1)")))
    yield refuse("a shape beyond all numbers", npy_of(shaped(f"({'9' * 4000}, {'9' * 4000}, 1, 1)")))
    yield refuse("a negative shape", npy_of(shaped("(-64, -1, 8, 8)"), bytes(4096)))
    yield refuse("no images", npy_of(shaped("(0, 1, 8, 8)")))
    yield refuse("records", npy_of("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (64,), }", bytes(256)))
    yield refuse("words", npy(np.full((64, 1, 8, 8), "word")))
    yield refuse("images that unpack to 200 MB", npz(images=np.zeros((50, 1, 2000, 2000), np.uint8)))
    yield refuse("arrays that overlap", overlapping("images.npy", npy(IMAGES)))
    yield refuse("encrypted arrays", encrypted(npz(images=IMAGES)))
    yield refuse("arrays by bzip2", zipped({"images.npy": npy(IMAGES)}, zipfile.ZIP_BZIP2))
    yield refuse("a thousand arrays", zipped({f"{index}.npy": npy(LABELS) for index in range(1000)}))
    yield refuse("an array beside the archive", zipped({"../images.npy": npy(IMAGES)}))
    yield refuse("arrays with wrong bits", flipped(npz(images=IMAGES), 0.02))
    yield refuse("images of a tebibyte", safetensors_of({"images": tensor([2**20, 1, 2**9, 2**9], 0, TERA)}))
    yield refuse("labels that are no integers", npz(images=IMAGES, labels=LABELS / 2), "evaluation")
    yield refuse("arrays that end early", npz(images=IMAGES)[:4200] + npz(images=IMAGES)[4300:], inside=False)
    yield refuse("NaN in the images", npz(images=SPOILT), code="values_not_finite", inside=True)
    yield refuse(
        "NaN to measure on", npz(images=SPOILT), "evaluation", code="values_not_finite", inside=True, alike=True
    )
    yield refuse("labels beyond the classes", npz(images=IMAGES, labels=LABELS + 1), "evaluation", inside=True)
    yield refuse("labels below zero", npz(images=IMAGES, labels=LABELS - 1), "evaluation", inside=True, alike=True)
    yield refuse("images of another size", npz(images=np.zeros((64, 3, 9, 9), np.uint8)), inside=True, alike=True)
    yield refuse("one image many times", npz(images=np.zeros((64, 1, 8, 8), np.uint8)), inside=True, alike=True)


def _archives() -> Iterator[Hostile]:
    def refuse(name: str, data: bytes | Callable[[Path], bytes], code: str = "images_invalid", **about: Any) -> Hostile:
        config = about.pop("config", PREPROCESS)
        return Hostile(name, "calibration", fixed(data) if isinstance(data, bytes) else data, code, config, **about)

    yield refuse("pictures without a word", zipped({"a.png": PNG}), "preprocess_missing", config={})
    yield refuse("a word without pictures", npz(images=IMAGES), "preprocess_unused")
    yield refuse("a picture above the archive", zipped({"../../a.png": PNG}))
    yield refuse("a picture at the root", zipped({"/etc/a.png": PNG}))
    yield refuse("a link", linked_zip("/etc/passwd"))
    yield refuse("pictures that overlap", overlapping("aaaaaaaa.png", bytes(10**6)))
    yield refuse("a picture packed a thousandfold", zipped({"a.png": bytes(30_000_000)}, zipfile.ZIP_DEFLATED))
    yield refuse("programs for pictures", zipped({"a.py": b"1", "b.so": b"\x7fELF"}))
    yield refuse(
        "a payload among pictures",
        lambda marker: zipped({"a.png": PNG, "b.pkl": pickled(marker)}),
        inside=True,
        payload=True,
    )
    yield refuse("a picture of 400 million pixels", zipped({"a.png": png(20_000, 20_000)}), inside=True)
    yield refuse(
        "a picture that grows when resized",
        zipped({"a.png": png(60_000, 1)}),
        inside=True,
        config={"preprocess": {"size": 512}},
    )
    yield refuse(
        "PostScript for a picture",
        zipped({"a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n(%pipe%id) (w) file\n"}),
        inside=True,
    )
    yield refuse("a picture cut short", zipped({"a.png": PNG[:-20]}), inside=True, alike=True)
    yield refuse(
        "tar: a picture above the archive", tarred(tar_entry("../a.png", size=len(PNG)), body=PNG), inside=True
    )
    yield refuse("tar: a link", tarred(tar_entry("a.png", tarfile.SYMTYPE, target="/etc/passwd")), inside=True)
    yield refuse("tar: a device", tarred(tar_entry("a.png", tarfile.CHRTYPE)), inside=True, alike=True)
    yield refuse("tar: a header of a tebibyte", tarred(tar_entry("a", tarfile.XHDTYPE, TERA)), inside=True)
    yield refuse(
        "tar: packed a thousandfold",
        gzip.compress(tarred(tar_entry("a.png", size=2**24), body=bytes(2**24)) * 4, mtime=0),
        inside=True,
    )


def _configurations() -> Iterator[Hostile]:
    def refuse(name: str, data: bytes | Callable[[Path], bytes], code: str = "config_invalid", **about: Any) -> Hostile:
        return Hostile(name, "config", fixed(data) if isinstance(data, bytes) else data, code, **about)

    yield refuse("a pickle as config", pickled, payload=True)
    yield refuse("a config nested without end", b'{"layers":' * 5_000)
    yield refuse("a config of another class", b'{"weight_bits": 2, "activation_bits": 2, "__class__": "os.system"}')
    yield refuse("numbers beyond all numbers", b'{"weight_bits": 2, "activation_bits": ' + b"9" * 5_000 + b"}")
    yield refuse("code in YAML", b"weight_bits: !!python/object/apply:os.system ['exit 1']")
    yield refuse("a config of two megabytes", b'{"weight_bits": 2' + b" " * 2_000_000 + b"}", "upload_too_large")
    yield refuse("letters that are none", b'{"weight_bits": 2, "method": "\xff\xfe"}')
