"""The images that ``quantize`` is given: in which form, which are held back, which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_runs import CALIBRATION, EVALUATION, SHORT, make_images, make_net, run

from aquant_core.config import QuantizationConfig
from aquant_core.errors import ImageSetError, NonFiniteError
from aquant_core.images import ImageSet
from aquant_core.pipeline import quantize
from aquant_core.planning import plan


def test_without_evaluation_images_some_are_held_back() -> None:
    report = run(evaluation=None, method="nearest").report
    assert report["evaluation"]["images"] == 48 // 8
    assert report["accuracy"] is None
    assert report["fidelity"]["quantized"]["n"] == 6
    assert any("6 calibration images held back" in warning for warning in report["warnings"])
    held_back = ImageSet(CALIBRATION.images[-6:])
    assert report["digests"]["evaluation"] == held_back.digest()
    assert report["digests"]["calibration"] == CALIBRATION.digest()
    labelled = run(evaluation=None, method="nearest", calibration=make_images(48, 1, labels=True)).report
    assert labelled["accuracy"]["quantized"]["n"] == 6


def test_what_is_held_back_is_not_learned_from() -> None:
    changed = CALIBRATION.images.clone()
    changed[-6:] = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(9))
    first, second = (run(evaluation=None, calibration=images, preset=SHORT) for images in (CALIBRATION.images, changed))
    states = [result.model.state_dict() for result in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_tensor_will_do_for_calibration() -> None:
    by_set, by_tensor = run(method="nearest"), run(method="nearest", calibration=CALIBRATION.images)
    assert by_set.report["digests"] == by_tensor.report["digests"]


def test_images_by_path_and_config_as_a_dict(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path / "images.safetensors")
    values = {"weight_bits": 4, "activation_bits": 4, "method": "nearest"}
    by_path = quantize(make_net(), tmp_path / "images.safetensors", values)
    by_value = quantize(make_net(), CALIBRATION, QuantizationConfig.model_validate(values))
    assert by_path.report["digests"] == by_value.report["digests"]


@pytest.mark.parametrize("factor", [255.0, 1 / 255])
def test_evaluation_images_of_another_scale_are_told_of_first_and_alone(factor: float) -> None:
    calibration, evaluation = make_images(48, 1), make_images(20, 2, labels=True)
    report = run(
        calibration=calibration, evaluation=ImageSet(factor * evaluation.images, evaluation.labels), preset=SHORT
    ).report
    assert report["scales"]["differ"] is True
    assert report["warnings"][0].startswith("Calibration and evaluation images are scaled differently: the calibration")
    assert "a spread 25" in report["warnings"][0]
    told = " ".join(report["warnings"])
    assert not any(advice in told for advice in ("would help", "more iterations", "more bits", "do not cover"))


def test_pixels_that_nobody_scaled_are_told_of() -> None:
    pixels = torch.randint(256, (48, 3, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    first, *_ = run(calibration=pixels, evaluation=None, method="nearest").report["warnings"]
    assert first.startswith("The calibration images are floats up to 255, all of them whole numbers")
    assert not any("whole numbers" in warning for warning in run(method="nearest").report["warnings"])


def test_the_report_tells_what_the_files_are_called(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path / "images.safetensors")
    config = {"weight_bits": 4, "activation_bits": 4, "method": "nearest", "sensitivity": False}
    given = (make_net(), tmp_path / "images.safetensors", config, EVALUATION)
    called = {"model": "net.onnx", "evaluation": "test.npz"}
    for run_of in (lambda *of, **more: quantize(*of, **more).report, plan):
        none_but_one = {"model": None, "calibration": "images.safetensors", "evaluation": None}
        assert run_of(*given)["sources"] == none_but_one
        assert run_of(*given, names=called)["sources"] == {"calibration": None, **called}
        assert run_of(*given, names={})["sources"] == dict.fromkeys(none_but_one)
    searched = quantize(*given[:2], {"target": {"max_accuracy_drop": 100}, "method": "nearest"}, names=called).report
    assert searched["sources"]["model"] == "net.onnx"


def test_images_of_another_kind_are_refused() -> None:
    images: Any = [1, 2]
    with pytest.raises(ImageSetError, match="calibration images are a list"):
        quantize(make_net(), images, {"weight_bits": 4, "activation_bits": 4})


def test_labels_of_the_calibration_images_are_checked_too() -> None:
    labelled = ImageSet(CALIBRATION.images, torch.full((48,), 5))
    with pytest.raises(ImageSetError, match="calibration labels go up to 5, the network has 5 classes"):
        run(calibration=labelled)


def test_outputs_that_are_not_finite() -> None:
    images = EVALUATION.images.clone()
    images[3] *= 5e37  # finite itself, not behind the second convolution
    with pytest.raises(NonFiniteError, match="float network"):
        run(evaluation=ImageSet(images))


@pytest.mark.parametrize("what", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.nan), NonFiniteError, "1 of 20 {what} images hold NaN"),
        (lambda x: x[:0], ImageSetError, r"The {what} images are torch.float32 of shape \(0, 3, 12, 12\)"),
        (lambda x: x[0], ImageSetError, r"shape \(3, 12, 12\), not float32 \(N, C, H, W\)"),
        (lambda x: x.double(), ImageSetError, "torch.float64"),
    ],
)
def test_bad_tensors_are_named(what: str, spoil: Any, error: type[Exception], words: str) -> None:
    images = {"calibration": CALIBRATION.images, "evaluation": EVALUATION.images}
    images[what] = spoil(EVALUATION.images)
    with pytest.raises(error, match=words.format(what=what)):
        quantize(make_net(), images["calibration"], {"weight_bits": 2, "activation_bits": 2}, images["evaluation"])
