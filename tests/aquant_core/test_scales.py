"""Which sets of images were scaled differently, and which look like pixels that nobody scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aquant_core.scales import like_bytes, of_different_scales, scales_of


def photographs(count: int = 32, seed: int = 0) -> Tensor:
    """Values of [0, 1], some sets darker than others."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        (lambda x: x, False),
        (lambda x: 0.5 * x, False),  # darker
        (lambda x: 0.4 * x + 0.6, False),  # brighter
        (lambda x: torch.zeros_like(x), False),  # black, of which nothing is known
        (lambda x: 255 * x, True),
        (lambda x: x / 255, True),
        (lambda x: (x - 0.45) / 0.225, True),
        (lambda x: x - 0.5, True),  # centred
        (lambda x: 2 * x - 1, True),
    ],
)
def test_sets_of_different_scales(change: Any, differ: bool) -> None:
    for calibration, evaluation in (
        (photographs(), change(photographs(8, 1))),
        (change(photographs()), photographs(8, 1)),
    ):
        assert scales_of(calibration, evaluation)["differ"] is differ


def test_a_negative_rounding_error_is_no_other_scale() -> None:
    images = photographs()
    images[0, 0, 0, 0] = -1e-7
    assert scales_of(images, photographs(8, 1))["differ"] is False


def test_normalised_sets_that_differ_in_their_range_alone() -> None:
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert scales_of(images, images.clamp(-1, 1))["differ"] is False


def test_the_warning_has_the_numbers_and_what_to_do() -> None:
    bytes_, fractions = torch.tensor([0.0, 255.0, 100.0, 155.0]), torch.tensor([0.0, 1.0, 0.5, 0.5])
    warning = of_different_scales(scales_of(bytes_, fractions))
    assert "the calibration images go from 0 to 255 (mean 127.5, std 92.23)" in warning
    assert "the evaluation images go from 0 to 1 (mean 0.5, std 0.3536), a spread 261 times as large" in warning
    assert "Prepare both as the network was trained" in warning
    centred = of_different_scales(scales_of(fractions, fractions - 0.5))
    assert "from -0.5 to 0.5" in centred
    assert "times" not in centred


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.tensor([[0.0, 255.0]]), True),
        (torch.tensor([[0.0, 80.0]]), True),
        (torch.tensor([[0.0, 255.5]]), False),
        (torch.tensor([[0.0, 1.0]]), False),  # black and white
        (torch.tensor([[-3.0, 3.0]]), False),
        (torch.tensor([[-128.0, 127.0]]), False),  # somebody has centred them
    ],
)
def test_pixels_that_nobody_scaled(images: Tensor, found: bool) -> None:
    assert (like_bytes(images, "calibration") is not None) is found
