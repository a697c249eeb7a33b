"""The arithmetic of border.cuh, compiled for the CPU, is IEEE's and the reference's on hard inputs, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import cuda_on_cpu
import pytest
import torch
from border_cases import evaluation
from torch import Tensor

from cupy_kernels import compilation, reference
from cupy_kernels.specification import BorderSpecification, Bound

COUNT = 1_000_000
ERRORS = [-1, 0, 1]
"""Of the device's approximate reciprocal, in units in the last place."""

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no g++, by which kernels are compiled for the CPU")


def evaluate(expression: str, error: int = 0, bound: Bound = "steep") -> Callable[[Tensor, Tensor], Tensor]:
    """The expression of a[i] and b[i] on the device, with an ``error`` of its reciprocal."""
    kernel = cuda_on_cpu.compile_for_cpu(evaluation(expression, bound), "evaluate", error)

    def run(a: Tensor, b: Tensor) -> Tensor:
        out = torch.full_like(a, 12345.0)
        kernel((1,), 32, [compilation._scalar(argument) for argument in (a, b, out, len(a))], 0)
        return out

    return run


def random_floats(low: float, high: float, seed: int = 0) -> Tensor:
    """Magnitudes between two powers of ten, of either sign."""
    g = torch.Generator().manual_seed(seed)
    size = 10.0 ** (torch.rand(COUNT, generator=g, dtype=torch.float64) * (high - low) + low)
    return (size * (torch.randint(0, 2, (COUNT,), generator=g) * 2 - 1)).float()


def nearly_halfway() -> tuple[Tensor, Tensor]:
    """Divisions n / d whose results lie as close to the middle between two floats as any do.

    With whole n, d and q of 24 bits, d (2 q + 1) = n 2^k + 1 or - 1: for an odd d there is one 2 q + 1 modulo 2^k.
    """
    g = torch.Generator().manual_seed(0)
    d = torch.randint(1 << 23, 1 << 24, (COUNT // 2,), generator=g) | 1
    d[:1000] = (1 << 24) - 1 - 2 * torch.arange(1000)  # reciprocals that are the hardest to round
    inverse = d.clone()  # to 3 bits, each step doubles them
    for _ in range(4):
        inverse = (inverse * (2 - d * inverse)) & ((1 << 25) - 1)
    pairs = []
    for k in (24, 25):
        for sign in (1, -1):
            twice = (sign * inverse) & ((1 << k) - 1)  # 2 q + 1
            twice = twice + (1 << 24) if k == 24 else twice
            n = (d * twice - sign) >> k
            fits = (twice >= 1 << 24) & (n >= 1 << 23) & (n < 1 << 24)
            assert torch.equal((d * twice - sign)[fits], n[fits] << k)
            pairs.append(torch.stack([n[fits], d[fits]]))
    n, d = torch.cat(pairs, 1)
    return n.float(), d.float()


def test_quotients_are_correctly_rounded() -> None:
    """From a correctly rounded reciprocal, as of the scale."""
    run = evaluate("quotient(a[i], b[i], 1.0f / b[i])")
    whole = torch.arange(1, COUNT + 1).float()
    cases = [
        (random_floats(-8, 6), random_floats(-8, 6, 1)), nearly_halfway(), (whole, whole.flip(0)),
        (whole, torch.full_like(whole, 2 - 2.0**-23)), (torch.zeros(COUNT), whole),
    ]  # fmt: skip
    for a, b in cases:
        assert len(a) > COUNT // 4
        wanted = torch.from_numpy(a.numpy() / b.numpy())
        assert torch.equal(run(a, b), wanted)
        assert torch.equal(run(-a, b), -wanted)


def test_the_activation_in_steps_is_the_reference_s() -> None:
    run = evaluate("Grid(b[0], 5.0f, 15.0f).t(a[i])")
    ends = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-30, 2.0**20, -(2.0**20)])
    for scale in (0.37, 1.0 / 3, 1e-4, 1e4, 1.1920928e-07, 0.99999994, 1.9999999):
        g = torch.Generator().manual_seed(1)
        t = torch.rand(COUNT // 4, generator=g) * 24 - 8
        x = torch.cat([t * scale, (t.floor() + 0.5) * scale, random_floats(-8, 30)[: COUNT // 4], ends])
        wanted = (x / torch.tensor(scale) + 5).clamp(-2, 17)
        torch.testing.assert_close(run(x, torch.tensor([scale])), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("error", ERRORS)
def test_the_sigmoid_is_the_reference_s(error: int) -> None:
    g = torch.Generator().manual_seed(2)
    limit = torch.tensor(8.0)
    edges = [limit, torch.nextafter(limit, limit + 1), torch.nextafter(limit, limit - 1), torch.tensor(torch.inf)]
    # The last is the one float for which a reciprocal too great by a unit would show, were it not refined.
    ends = torch.cat([torch.stack(edges), torch.tensor([0.0, 1e-40, torch.nan, 7.646613597869873])])
    w = torch.cat([torch.rand(COUNT, generator=g) * 24 - 12, random_floats(-12, 1), ends, -ends])
    found, wanted = evaluate("sigmoid_minus_half(a[i])", error)(w, w), reference.sigmoid_minus_half(w)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("bound", get_args(Bound))
def test_bounded_shifts_are_the_reference_s(bound: Bound, error: int) -> None:
    v = torch.cat([random_floats(-6, 2), torch.tensor([0.0, 0.5, -0.5, torch.inf, -torch.inf, torch.nan])])
    found = evaluate("bounded_shift(a[i])", error, bound)(v, v)
    wanted = reference.bounded_shift(v, BorderSpecification(15, bound=bound))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_ceilings() -> None:
    g = torch.Generator().manual_seed(3)
    whole = torch.arange(-300.0, 301.0)
    near = [whole, torch.nextafter(whole, whole + 1), torch.nextafter(whole, whole - 1), whole + 0.5]
    small = torch.tensor([-0.0, 1e-40, -1e-40, 1e-8, -1e-8, 2.0**21, -(2.0**21), torch.nan])
    value = torch.cat([(torch.rand(COUNT, generator=g) - 0.5) * 600, random_floats(-12, 5), *near, small])
    found = evaluate("ceil_of(a[i])")(value, value)
    torch.testing.assert_close(found, value.ceil(), rtol=0, atol=0, equal_nan=True)
