"""Thresholds stand for a border: over all fp16 values code for code, and where they could not they are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cupy_kernels import reference, thresholds
from cupy_kernels.specification import BorderSpecification, Bound, Window
from cupy_kernels.thresholds import NoThresholdsError, check_thresholds, codes_of, derive, search

BITS = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
HALVES = BITS[~BITS.isnan()].sort().values
"""Every fp16 value, infinities included."""

BY_POSITION = BorderSpecification(7, fused=False)


def has_thresholds(border: Tensor, spec: BorderSpecification) -> bool:
    try:
        check_thresholds(border, spec)
    except NoThresholdsError:
        return False
    return True


def reference_codes(x: Tensor, scale: Tensor, border: Tensor, spec: BorderSpecification) -> Tensor:
    """Codes of the same values in each channel, (K = 1): (values, C)."""
    columns = x.float().expand(1, border.shape[1], 1, -1)
    return reference.codes(columns, scale, border, None, Window(), spec)[0].t()


def counted(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many of a channel's thresholds, (Q, C), lie below each value, (values,) or (values, C)."""
    columns = x if x.dim() == 2 else x[:, None].expand(-1, thresholds.shape[1])
    return (columns[:, None] > thresholds).sum(1)


@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("bound", get_args(Bound))
@pytest.mark.parametrize("levels", [1, 3, 7, 15])
def test_all_halves_get_the_reference_s_codes(levels: int, bound: Bound, terms: int) -> None:
    g = torch.Generator().manual_seed(levels)
    for zero_point in (0, levels // 2, levels):
        spec = BorderSpecification(levels, zero_point, bound, fused=False)
        scale = torch.rand((), generator=g) + 0.02
        border = torch.randn(terms, 12, 1, generator=g) * min(0.12 * levels, 1.0)
        border[0, 0], border[1:, 0] = -20.0, 0.0  # B = 0, or nearly
        border[:, 1] = 0.0
        border = border[:, [has_thresholds(border[:, [channel]], spec) for channel in range(12)]]
        channels = border.shape[1]
        assert channels >= 8
        assert has_thresholds(border, spec)
        thresholds = derive(border, scale, spec, torch.float16)
        assert (thresholds.shape, thresholds.dtype) == ((1, levels, channels), torch.float16)
        assert (thresholds.diff(dim=1) >= 0).all()
        assert torch.equal(counted(HALVES, thresholds[0]), reference_codes(HALVES, scale, border, spec))


def test_each_position_has_its_own() -> None:
    g = torch.Generator().manual_seed(0)
    border, scale = torch.randn(3, 4, 6, generator=g), torch.tensor(0.3)
    together = derive(border, scale, BY_POSITION, torch.float16)
    assert together.shape == (6, 7, 4)
    for position in range(6):
        alone = derive(border[:, :, position : position + 1], scale, BY_POSITION, torch.float16)
        assert torch.equal(together[position], alone[0])
    x = torch.randn(6, 100, 4, generator=g).half()
    assert torch.equal((x[:, :, None] > together[:, None]).sum(2), codes_of(x, border, scale, BY_POSITION))


@pytest.mark.parametrize(
    ("dtype", "zero_point"), [(torch.float16, 0), (torch.float16, 2), (torch.float32, 0), (torch.float16, 7)]
)
def test_rounding_to_nearest_by_hand(dtype: torch.dtype, zero_point: int) -> None:
    # B = 1/2: code i is exceeded above x = s (i + 1/2 - z); with s = 1/4 all of that is exact.
    found = derive(torch.zeros(2, 1, 1), torch.tensor(0.25), replace(BY_POSITION, zero_point=zero_point), dtype)
    assert found.flatten().tolist() == [0.25 * (code + 0.5 - zero_point) for code in range(7)]
    assert found.dtype == dtype


def test_a_constant_shift_by_hand() -> None:
    # e = 1/4 by clip, B = 3/4: x = s (i + 3/4).  e = -1/2, B = 0: x = s i, which itself has the code i.
    spec = BorderSpecification(3, 0, "clip", fused=False)
    found = derive(torch.tensor([[[0.25], [-3.0]], [[0.0], [0.0]]]), torch.tensor(2.0), spec, torch.float16)
    assert found[0].t().tolist() == [[1.5, 3.5, 5.5], [0.0, 2.0, 4.0]]


@pytest.mark.parametrize("bound", get_args(Bound))
@pytest.mark.parametrize("zero_point", [0, 3])
def test_single_precision_differs_next_to_thresholds_alone(bound: Bound, zero_point: int) -> None:
    g = torch.Generator().manual_seed(1)
    spec = BorderSpecification(7, zero_point, bound, fused=False)
    scale, border = torch.tensor(0.3), torch.randn(3, 16, 1, generator=g) * 0.6
    assert has_thresholds(border, spec)
    thresholds = derive(border, scale, spec, torch.float32)[0]  # (Q, C)
    near = thresholds.repeat(200, 1) * (1 + torch.randn(1400, 16, generator=g) * 3e-7)
    anywhere = (torch.rand(5000, 16, generator=g) * 10 - 1 - zero_point) * scale
    for x in (near, anywhere, thresholds):
        wrong = counted(x, thresholds) != codes_of(x[None], border, scale, spec)[0]
        distance = (x[:, None] - thresholds).abs().amin(1)
        assert (distance[wrong] <= 2.0**-23 * 7 * scale).all()
        assert int(wrong.sum()) <= 0.01 * wrong.numel()


def test_refused_with_fusion_and_beyond_4_bits() -> None:
    border = torch.zeros(3, 2, 4)
    assert has_thresholds(border, BY_POSITION)
    assert has_thresholds(border, replace(BY_POSITION, levels=15))
    assert not has_thresholds(border, replace(BY_POSITION, fused=True))
    assert not has_thresholds(border, replace(BY_POSITION, levels=31))
    assert not has_thresholds(border, replace(BY_POSITION, levels=16))


@pytest.mark.parametrize(("bound", "steepest"), [("steep", 2.5 / 4), ("stretched", 2.5 / 4), ("clip", 1.0)])
def test_refused_where_the_border_rises_as_fast_as_the_activation(bound: Bound, steepest: float) -> None:
    spec = replace(BY_POSITION, bound=bound)
    limit = 7 / steepest  # of dv/du, where dB/dt could be 1
    for b1, b2, has in (
        (0.98 * limit, 0.0, True),
        (1.0 * limit, 0.0, False),
        (-5 * limit, 0.0, True),  # falling
        (0.0, 0.49 * limit, True),  # b1 + 2 b2 u, steepest at u = 1
        (0.0, 0.5 * limit, False),
        (1.1 * limit, -2 * limit, False),  # steepest at u = 0
        (-2 * limit, 1.4 * limit, True),
        (-2 * limit, 1.6 * limit, False),
    ):
        border = torch.zeros(3, 3, 2)
        border[1, 1, 1], border[2, 1, 1] = b1, b2  # one of them is enough
        assert has_thresholds(border, spec) == has, (b1, b2)
        if b2 == 0:
            assert has_thresholds(border[:2], spec) == has


def test_what_would_go_wrong_by_hand() -> None:
    # s = 1, Q = 3, clip, v = -1 + 2 t. x = 0.2: v = -0.6, B = 0, so code ceil(0.2) = 1.
    # x = 0.75: v = 0.5, B = 1, ceil(-0.25) = 0: the code falls where x rises, and no threshold tells.
    spec = BorderSpecification(3, 0, "clip", fused=False)
    border, scale = torch.tensor([[[-1.0]], [[6.0]]]), torch.tensor(1.0)
    assert not has_thresholds(border, spec)
    x = torch.tensor([0.2, 0.75])
    assert reference_codes(x, scale, border, spec).flatten().tolist() == [1, 0]
    found = search(border, scale, spec, torch.float32)
    assert counted(x, found[0]).flatten().tolist() != [1, 0]
    with pytest.raises(NoThresholdsError, match=r"channel 0 at position 0 may rise with dB/dt = 2, 0\.99 is the most"):
        derive(border, scale, spec, torch.float16)


@pytest.mark.parametrize(
    ("bound", "scale", "zero_point", "b0", "b1"),
    [
        ("clip", 0.10468439757823944, 3, -2.4389281272888184, 6.857497215270996),
        ("stretched", 0.9393630623817444, 3, -3.813178539276123, 10.874448776245117),
        ("clip", 0.4253167510032654, 0, -0.4999995231628418, 6.225313663482666),
    ],
)
def test_refused_where_a_threshold_lies_next_to_zero(
    bound: Bound, scale: float, zero_point: int, b0: float, b1: float
) -> None:
    """B nears 0 at x = 0, where t - B hardly rises from one fp16 value to the next: thresholds would be wrong there."""
    spec, s = BorderSpecification(7, zero_point, bound, fused=False), torch.tensor(scale)
    border = torch.tensor([[[b0]], [[b1]]])
    assert not has_thresholds(border, spec)
    with pytest.raises(
        NoThresholdsError, match=r"channel 0 at position 0 is B = \S+ at x = 0, too close to an integer"
    ):
        derive(border, s, spec, torch.float16)
    found = search(border, s, spec, torch.float16)
    assert not torch.equal(counted(HALVES, found[0]), reference_codes(HALVES, s, border, spec))


def test_the_position_at_fault_is_named() -> None:
    border = torch.zeros(3, 4, 9)
    border[1, 2, 5], border[1, 3, 0] = 7 / 0.625 * 1.5, 7 / 0.625 * 2
    with pytest.raises(
        NoThresholdsError,
        match=r"channel 2 at position 5 may rise with dB/dt = 1\.5, 0\.99 is the most \(2 of 36 like it\)",
    ):
        derive(border, torch.tensor(0.1), BY_POSITION, torch.float16)
    with pytest.raises(NoThresholdsError, match="with fusion channel_mean a border depends on its whole window"):
        check_thresholds(border, replace(BY_POSITION, fused=True))
    with pytest.raises(NoThresholdsError, match="codes up to 31 would take as many thresholds; 15 are the most"):
        check_thresholds(border, replace(BY_POSITION, levels=31))


def test_what_does_not_tell_the_codes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has come out of the search, each threshold is tried on the values beside it."""
    border, scale = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)) * 0.5, torch.tensor(0.3)
    right = derive(border, scale, BY_POSITION, torch.float16)
    for level, channel, position in ((0, 0, 0), (6, 3, 8), (3, 1, 4)):
        for away in (-torch.inf, torch.inf):
            wrong = right.clone()
            wrong[position, level, channel] = torch.nextafter(
                right[position, level, channel], torch.tensor(away).half()
            )
            monkeypatch.setattr(thresholds, "search", lambda *_, found=wrong: found)
            with pytest.raises(NoThresholdsError, match=f"channel {channel} at position {position} has another code"):
                derive(border, scale, BY_POSITION, torch.float16)


@settings(max_examples=60, deadline=None)
@given(
    bound=st.sampled_from(get_args(Bound)),
    levels=st.sampled_from([3, 7, 15]),
    share=st.floats(0, 1),
    scale=st.floats(2.0**-12, 8, width=32),
    coefficients=st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3),
    terms=st.integers(2, 3),
)
def test_any_border_has_thresholds_that_are_right_or_a_reason(
    bound: Bound, levels: int, share: float, scale: float, coefficients: list[float], terms: int
) -> None:
    spec = BorderSpecification(levels, round(share * levels), bound, fused=False)
    border, step = torch.tensor(coefficients[:terms])[:, None, None], torch.tensor(scale)
    if not has_thresholds(border, spec):
        with pytest.raises(NoThresholdsError, match="channel 0 at position 0"):
            derive(border, step, spec, torch.float16)
        return
    found = derive(border, step, spec, torch.float16)
    assert torch.equal(counted(HALVES, found[0]), reference_codes(HALVES, step, border, spec))
