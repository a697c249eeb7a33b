"""The border's parameters: how many there are, where they start, and where they are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aquant_core.border import Border
from aquant_core.config import BorderConfig


@pytest.mark.parametrize(
    ("switches", "coefficients", "alpha"),
    [
        ({}, (3, 4, 9), None),
        ({"form": "linear"}, (2, 4, 9), None),
        ({"alpha": "learned"}, (3, 4, 9), (4, 9)),
        ({"granularity": "channel", "fusion": "none"}, (3, 4, 1), None),
        ({"granularity": "channel", "fusion": "none", "form": "linear"}, (2, 4, 1), None),
    ],
)
def test_shapes_and_counts(
    switches: dict[str, Any], coefficients: tuple[int, ...], alpha: tuple[int, ...] | None
) -> None:
    border = Border(BorderConfig(**switches), channels=4, positions=9)
    shapes = [tuple(tensor.shape) for tensor in border.tensors()]
    assert shapes == [coefficients] + ([] if alpha is None else [alpha])
    assert border.number_of_parameters() == sum(torch.Size(shape).numel() for shape in shapes)
    assert len(list(border.parameters())) == len(shapes)


def test_starts_at_one_half() -> None:
    border = Border(BorderConfig(alpha="learned"), 2, 4)
    assert border.coefficients.count_nonzero() == 0
    assert border.alpha is not None
    assert (border.alpha == 1).all()


def test_one_position_has_no_alpha() -> None:
    assert Border(BorderConfig(alpha="learned"), 5, 1).alpha is None


def test_projection_keeps_alpha_between_0_and_1_and_leaves_the_rest() -> None:
    border = Border(BorderConfig(alpha="learned"), 1, 3)
    assert border.alpha is not None
    with torch.no_grad():
        border.alpha.copy_(torch.tensor([[-0.5, 0.25, 1.5]]))
        border.coefficients.fill_(7.0)
    border.project()
    assert border.alpha.tolist() == [[0.0, 0.25, 1.0]]
    assert (border.coefficients == 7).all()


def test_stored_precision_is_reached_and_kept() -> None:
    border = Border(BorderConfig(alpha="learned"), 3, 9)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in border.tensors():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
        border.coefficients[0, 0, 0], border.coefficients[0, 0, 1] = 1e6, -1e6
    before = border.coefficients.detach().clone()
    border.round_to_stored()
    for tensor in border.tensors():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.half().float())
        assert torch.isfinite(tensor).all()
    assert border.coefficients[0, 0, :2].tolist() == [65504.0, -65504.0]
    torch.testing.assert_close(border.coefficients[1:], before[1:], atol=1e-6, rtol=2**-11)
    assert not torch.equal(border.coefficients, before)
    once = border.coefficients.detach().clone()
    border.round_to_stored()
    assert torch.equal(border.coefficients, once)
