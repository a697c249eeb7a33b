"""Whatever bytes arrive, the API's readers answer with one of the service's own errors, or take them.

``--hypothesis-profile=long`` tries many times as many.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import uploads
from hostile import corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from spoiling import found_before, spoilt

from aquant_core.config import Preprocess, QuantizationConfig
from service.jobs.errors import ServiceError
from service.jobs.image_files import check_images
from service.jobs.model_files import check_model
from service.jobs.submission import read_config

FILES = [(one.slot, one.data(Path("nowhere"))) for one in corpus()]
SMALL = [(slot, data) for slot, data in FILES if len(data) < 20_000]
MODELS = [uploads.onnx_model(), *(data for slot, data in SMALL if slot == "model")]
IMAGES = [uploads.images(), *(data for slot, data in SMALL if slot in ("calibration", "evaluation"))]
CONFIGS = [
    b'{"weight_bits": 2, "activation_bits": 3, "layers": {"fc": {"weight_bits": 4}}, "border": {"alpha": "learned"}}',
    b'{"weight_bits": 8, "activation_bits": 32, "preprocess": {"size": [9, 8], "crop": null, "mean": [0], "std": [1]}}',
    b'{"weight_bits": 4, "activation_bits": 4, "seed": 9, "compare": ["nearest"], "protocol_switches": {}}',
]


def read_model(data: bytes) -> None:
    assert check_model(io.BytesIO(data), len(data), "resnet18") in ("onnx", "safetensors", "pth")


def read_images(data: bytes) -> None:
    kind = check_images(io.BytesIO(data), len(data), "calibration", 10**8, Preprocess())
    assert kind in ("npz", "npy", "safetensors", "zip", "tar", "tgz")


def read_configuration(data: bytes) -> None:
    config = read_config(data)
    text = json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert QuantizationConfig.model_validate_json(text) == config


READERS = {"model": read_model, "images": read_images, "config": read_configuration}


def has_words(error: ServiceError) -> None:
    assert error.detail
    assert error.remedy
    str(error).encode()


def answered(reader: str, data: bytes) -> None:
    """It is taken, or refused in words."""
    try:
        READERS[reader](data)
    except ServiceError as error:
        has_words(error)


@pytest.mark.parametrize("path", [path for name in READERS for path in found_before(name)], ids=lambda path: path.name)
def test_what_once_broke_a_reader(path: Path) -> None:
    answered(path.parent.name, path.read_bytes())


@settings(deadline=None)
@given(spoilt(MODELS))
def test_models(data: bytes) -> None:
    answered("model", data)


@settings(deadline=None)
@given(spoilt(IMAGES))
def test_images(data: bytes) -> None:
    answered("images", data)


@settings(deadline=None)
@given(st.one_of(spoilt(CONFIGS), st.binary(max_size=200)))
def test_configurations(data: bytes) -> None:
    answered("config", data)


NAMES = ["weight_bits", "activation_bits", "layers", "border", "preprocess", "mean", "std", "size", "seed", "compare"]
DOCUMENTS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(NAMES)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=8)), inner)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(DOCUMENTS)
def test_documents(document: object) -> None:
    answered("config", json.dumps(document).encode())


@settings(deadline=None)
@given(DOCUMENTS)
def test_headers_of_safetensors(document: object) -> None:
    header = json.dumps({"images": document}).encode()
    for reader in ("model", "images"):
        answered(reader, len(header).to_bytes(8, "little") + header + bytes(64))
