"""Reports of real runs on a small network, and plans of them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from aquant_core.images import ImageSet
from aquant_core.methods import Preset
from aquant_core.pipeline import quantize
from aquant_core.planning import plan

SHORT = Preset(12, 8, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)


class Net(nn.Module):
    """A stem, a residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5, bias=False)
        nn.init.normal_(self.fc.weight, std=3.0)  # else it decides for one class, whatever the image

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _given(labels: bool) -> tuple[nn.Module, ImageSet, ImageSet]:
    """Network, calibration and evaluation images."""
    torch.manual_seed(0)
    net = Net().eval()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(60, 3, 12, 12, generator=generator) + torch.randn(60, 3, 1, 1, generator=generator)
    classes = torch.randint(5, (60,), generator=generator) if labels else None
    calibration = ImageSet(images[:40], None if classes is None else classes[:40])
    return net, calibration, ImageSet(images[40:], None if classes is None else classes[40:])


def run(labels: bool = True, preset: Preset | None = None, **changes: Any) -> dict[str, Any]:
    """A real run's report, as it is written."""
    net, calibration, evaluation = _given(labels)
    config = {"weight_bits": 2, "activation_bits": 2, **changes}
    result = quantize(net, calibration, config, evaluation, preset=preset or SHORT)
    report: dict[str, Any] = json.loads(json.dumps(result.report, allow_nan=False))
    return report


def lossy(**changes: Any) -> dict[str, Any]:
    """The same of a run that cost accuracy: labels are drawn here, so that a real one may as well gain some."""
    report = run(**changes)
    report["accuracy"]["float"]["top1"] = max(0.05 + report["accuracy"]["quantized"]["top1"], 0.5)
    return report


def planned(**changes: Any) -> dict[str, Any]:
    """A real plan of the same, as it is written."""
    net, calibration, evaluation = _given(labels=True)
    config = {"weight_bits": 2, "activation_bits": 2, "dry_run": True, **changes}
    document: dict[str, Any] = json.loads(json.dumps(plan(net, calibration, config, evaluation, preset=SHORT)))
    return document
