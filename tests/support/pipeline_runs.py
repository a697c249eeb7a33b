"""Runs of ``quantize`` on a small network, each a second or so, for tests of the pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aquant_core.config import QuantizationConfig
from aquant_core.images import ImageSet
from aquant_core.methods import Preset
from aquant_core.pipeline import QuantizationResult, quantize

QUICK = Preset(60, 16, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
SHORT = replace(QUICK, iterations=6, batch_size=8)


class Net(nn.Module):
    """A stem, a residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.fc(x.mean((2, 3)))


def make_images(count: int, seed: int, labels: bool = False) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 12, 12, generator=generator)
    return ImageSet(images, torch.randint(5, (count,), generator=generator) if labels else None)


CALIBRATION, EVALUATION = make_images(48, 1), make_images(20, 2, labels=True)


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 3, 12, 12))  # gives the norm statistics of its own
    return net.eval()


def run(
    on_progress: Any = None,
    evaluation: ImageSet | None = EVALUATION,
    preset: Preset | None = QUICK,
    calibration: ImageSet | Tensor = CALIBRATION,
    **changes: Any,
) -> QuantizationResult:
    config = QuantizationConfig(**{"weight_bits": 2, "activation_bits": 2} | changes)
    return quantize(make_net(), calibration, config, evaluation, on_progress, preset)
