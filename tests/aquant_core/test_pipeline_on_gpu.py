"""``quantize`` on a GPU: the same bytes again, wherever the images lie, and a checkpoint that gives the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import aquant_core
from aquant_core.config import Method
from aquant_core.evaluation import logits_of
from aquant_core.methods import PRESETS
from aquant_core.resources import Resources

pytestmark = pytest.mark.gpu
EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"
NAMES = ("calibration", "evaluation")
SHORT = replace(PRESETS["smoke"], iterations=12)


class Net(nn.Module):
    """An ordinary, a depthwise and a grouped convolution in a residual block, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


def images(count: int, seed: int) -> aquant_core.ImageSet:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 12, 12, generator=generator)
    return aquant_core.ImageSet(x, torch.randint(5, (count,), generator=generator))


CALIBRATION, EVALUATION = images(48, 1), images(20, 2)


def quantized(
    resume_from: Path | None = None, device_bytes: int | None = None, **config: object
) -> aquant_core.QuantizationResult:
    torch.manual_seed(0)
    resources = Resources(torch.device("cuda"), device_bytes, 0 if device_bytes == 0 else None)
    settings = {"weight_bits": 2, "activation_bits": 2, **config}
    return aquant_core.quantize(
        Net().eval(), CALIBRATION, settings, EVALUATION, preset=SHORT, resources=resources, resume_from=resume_from
    )


def test_the_same_bytes_again_and_from_mapped_files() -> None:
    first = quantized()
    assert {block["placement"] for block in first.report["blocks"]} == {"device"}
    assert quantized().report["digests"] == first.report["digests"]
    spilled = quantized(device_bytes=0)
    assert {block["placement"] for block in spilled.report["blocks"]} == {"disk"}
    assert spilled.report["digests"] == first.report["digests"]


def test_every_method_on_an_example_network() -> None:
    """In one run, beside each other; what learns is better than nearest."""
    others: list[Method] = ["nearest", "adaround", "brecq", "qdrop", "qdrop_refactored", "aquant_no_border"]
    calibration, evaluation = (
        aquant_core.read_images(EXAMPLE / f"{name}.npz") for name in ("calibration", "evaluation")
    )
    report = aquant_core.quantize(
        EXAMPLE / "residual.onnx",
        calibration.images[:256],
        {"weight_bits": 2, "activation_bits": 2, "preset": "smoke", "compare": others},
        evaluation,
        resources=Resources(torch.device("cuda")),
    ).report
    found = {row["method"]: row["accuracy"]["top1"] for row in report["comparison"]}
    assert found.keys() == {*others, "aquant"}
    assert all(found[method] > found["nearest"] + 0.05 for method in found if method != "nearest"), found


@pytest.mark.parametrize("border", [{"alpha": "learned", "fusion": "channel_mean"}, {"granularity": "channel"}])
def test_a_checkpoint_gives_the_logits_of_the_run(border: dict[str, str], tmp_path: Path) -> None:
    result = quantized(border=border)
    result.save(tmp_path / "quantized.safetensors")
    loaded = aquant_core.load(tmp_path / "quantized.safetensors", device="cuda")
    device = torch.device("cuda")
    expected = logits_of(result.model, EVALUATION.images, device)
    assert torch.equal(logits_of(loaded, EVALUATION.images, device), expected)
    assert torch.equal(
        logits_of(loaded.cpu(), EVALUATION.images, torch.device("cpu")).argmax(1), expected.cpu().argmax(1)
    )


def test_a_run_that_goes_on_from_finished_blocks_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = quantized(tmp_path)
    last = max(tmp_path.iterdir(), key=lambda path: path.name)
    last.unlink()
    assert quantized(tmp_path).report["digests"] == whole.report["digests"]
