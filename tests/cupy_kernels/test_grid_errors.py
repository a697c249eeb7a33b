"""The fused error of many grids against plain torch in double precision."""

from __future__ import annotations

import pytest
import torch

from cupy_kernels.grid_errors import grid_errors


@pytest.mark.parametrize("levels", [3, 15, 255])
def test_equal_to_torch(levels: int) -> None:
    g = torch.Generator().manual_seed(levels)
    rows = torch.randn(5, 37, generator=g)
    rows[1] = 0
    rows[2, ::2] = 0.25 * rows[2, 1]  # small and large together
    scales = torch.rand(5, 7, generator=g) * 4 / levels + 1e-3
    zero_points = torch.randint(levels + 1, (5, 7), generator=g).float()
    actual = grid_errors(rows, scales, zero_points, levels)
    for grid in range(7):
        scale, zero_point = scales[:, grid, None], zero_points[:, grid, None]
        q = (torch.round(rows / scale) + zero_point).clamp(0, levels)
        error = ((q - zero_point).double() * scale.double() - rows.double()).abs().pow(2.4).sum(1)
        torch.testing.assert_close(actual[:, grid].double(), error, rtol=2e-5, atol=1e-12)


def test_the_number_of_threads_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    problem = torch.randn(16, 50, generator=g), torch.rand(16, 4, generator=g) + 0.1, torch.ones(16, 4), 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = grid_errors(*problem)
        torch.set_num_threads(2)
        assert torch.equal(one, grid_errors(*problem))
    finally:
        torch.set_num_threads(before)
