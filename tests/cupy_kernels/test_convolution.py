"""The convolution of quantized columns against columns and products written out, and what memory it takes."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cupy_kernels import convolution
from cupy_kernels.convolution import border_convolution
from cupy_kernels.ops import border_columns, reference_only
from cupy_kernels.specification import BorderSpecification, Window

CHANNELS, OUT = 4, 8
LEAVES = ("x", "scale", "border", "alpha", "weight")
GROUPS = {
    "ordinary": (1, OUT),
    "grouped": (2, OUT),
    "two_a_channel": (CHANNELS, OUT),
    "depthwise": (CHANNELS, CHANNELS),
}
GEOMETRIES = {
    "padded": Window((3, 3), padding=(1, 1)),
    "stride": Window((3, 3), stride=(2, 1), padding=(1, 0)),
    "dilation": Window((3, 2), padding=(2, 1), dilation=(2, 1)),
}


def problem(
    kind: str = "ordinary",
    geometry: str = "padded",
    images: int = 5,
    fused: bool = True,
    alpha: bool = True,
    terms: int = 3,
    rounding: float | Tensor = 0.7,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of ``border_convolution``; without ``terms`` there is no border."""
    g = torch.Generator().manual_seed(3)
    (groups, out), window = GROUPS[kind], GEOMETRIES[geometry]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    weights = torch.rand(CHANNELS, window.positions, generator=g).to(dtype).requires_grad_()
    return {
        "x": leaf(images, CHANNELS, 6, 7), "scale": torch.tensor(0.3, dtype=dtype, requires_grad=True),
        "border": leaf(terms, CHANNELS, window.positions) if terms else None,
        "alpha": weights if alpha and fused and terms else None,
        "weight": leaf(out, CHANNELS // groups, *window.kernel_size), "bias": leaf(out).detach(), "window": window,
        "groups": groups, "spec": BorderSpecification(7, 2, fused=fused), "rounding": rounding,
    }  # fmt: skip


def written_out(
    x: Tensor, scale: Tensor, border: Tensor | None, alpha: Tensor | None, weight: Tensor, bias: Tensor | None,
    window: Window, groups: int, spec: BorderSpecification, rounding: float | Tensor,
) -> Tensor:  # fmt: skip
    """The columns of all images and one product."""
    columns = border_columns(x, scale, border, alpha, window, spec, rounding)  # (N, C K, L)
    matrix = weight.reshape(groups, len(weight) // groups, -1)  # (G, O/G, C K/G)
    result = torch.einsum("gok,ngkl->ngol", matrix, columns.view(len(x), groups, matrix.shape[2], -1))
    result = result.reshape(len(x), len(weight), *window.output_size(x.shape[2], x.shape[3]))
    return result if bias is None else result + bias.view(1, -1, 1, 1)


def value_and_gradients(function: Any, given: dict[str, Any]) -> dict[str, Tensor | None]:
    """What the function returns, and the gradient of each leaf for one fixed gradient of the result."""
    leaves = {name: given[name] for name in LEAVES if given[name] is not None}
    value = function(**given)
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
    gradients = torch.autograd.grad(value, list(leaves.values()), grad)
    return {"value": value.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_same(actual: dict[str, Tensor | None], wanted: dict[str, Tensor | None], relative: float) -> None:
    """Every tensor within ``relative`` of its largest element."""
    assert actual.keys() == wanted.keys()
    for name, expected in wanted.items():
        found = actual[name]
        assert found is not None, name
        assert expected is not None, name
        assert found.shape == expected.shape, name
        size = max(float(expected.abs().max()), 1.0)
        error = float((found - expected).abs().max())
        assert error <= relative * size, f"{name}: {error} of {size}"


BORDERS: dict[str, dict[str, Any]] = {
    "fused": {"alpha": False},
    "weighted": {},
    "linear": {"terms": 2},
    "by_position": {"fused": False},
    "none": {"terms": 0},
    "hard": {"rounding": 1.0},
}


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", GROUPS)
def test_equals_columns_and_a_product(kind: str, geometry: str, border: str) -> None:
    given = problem(kind, geometry, **BORDERS[border])
    assert_same(value_and_gradients(border_convolution, given), value_and_gradients(written_out, given), 2e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(GROUPS)),
    st.sampled_from(sorted(GEOMETRIES)),
    st.sampled_from(sorted(BORDERS)),
    st.integers(1, 6),
    st.floats(0, 1),
)
def test_equals_them_in_double_precision(kind: str, geometry: str, border: str, images: int, rounding: float) -> None:
    """float64 is computed by the reference, so that nothing but the product can differ: to its last digits."""
    given = problem(kind, geometry, images, dtype=torch.float64, **{"rounding": rounding} | BORDERS[border])
    assert_same(value_and_gradients(border_convolution, given), value_and_gradients(written_out, given), 1e-12)


@pytest.mark.parametrize("kind", GROUPS)
def test_gradcheck_where_nothing_is_rounded(kind: str) -> None:
    """At the rounding schedule's 0 the whole operator is smooth but for the clips, so differences tell its slope."""
    given = problem(kind, "stride", images=1, rounding=0.0, dtype=torch.float64)
    x = given["x"].detach()[:, :, :4, :4].clone().requires_grad_()

    def convolved(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return border_convolution(**given | {"x": x, "scale": scale, "weight": weight})

    assert torch.autograd.gradcheck(convolved, (x, given["scale"], given["weight"]))


@pytest.mark.parametrize("kind", GROUPS)
def test_the_fused_loops_and_the_reference_agree(kind: str) -> None:
    given = problem(kind)
    with reference_only():
        wanted = value_and_gradients(border_convolution, given)
    assert_same(value_and_gradients(border_convolution, given), wanted, 2e-5)


@pytest.mark.parametrize("kind", GROUPS)
def test_without_a_bias_and_with_the_rounding_in_a_tensor(kind: str) -> None:
    given = problem(kind)
    bias = given["bias"]
    with_bias = border_convolution(**given)
    without = border_convolution(**given | {"bias": None, "rounding": torch.tensor(given["rounding"])})
    torch.testing.assert_close(without + bias.view(1, -1, 1, 1), with_bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", GROUPS)
def test_the_images_at_a_time_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(kind)
    column_bytes = 4 * CHANNELS * 9 * 6 * 7  # of one image
    results = []
    for budget in (1, 2 * column_bytes, 1 << 40):  # one by one, in parts of 2, 2 and 1, and all
        monkeypatch.setattr(convolution, "COLUMN_BYTES_CPU", budget)
        results.append(value_and_gradients(border_convolution, given))
    for other in results[1:]:
        assert_same({"value": other["value"]}, {"value": results[0]["value"]}, 1e-6)
        assert_same(other, results[0], 1e-5)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def only(forced: bool) -> AbstractContextManager[None]:
    return reference_only() if forced else nullcontext()


@pytest.mark.parametrize(
    ("kind", "forced"),
    [
        ("ordinary", False), ("grouped", False), ("depthwise", False), ("ordinary", True), ("grouped", True),
        pytest.param("depthwise", True),
    ],
)  # fmt: skip
def test_no_step_holds_the_columns_of_all_images(kind: str, forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "COLUMN_BYTES_CPU", 1)
    images = 16
    given, columns = problem(kind, images=images), CHANNELS * 9 * 6 * 7  # of one image
    largest = LargestTensor()  # type: ignore[no-untyped-call]
    with only(forced), largest:
        value_and_gradients(written_out, given)
    assert largest.elements >= images * columns  # the measure sees them where they are
    largest.elements = 0
    with only(forced), largest:
        value_and_gradients(border_convolution, given)
    # One image's columns, or one value for each of all images' pixels (padded) and outputs.
    assert largest.elements <= max(columns, images * CHANNELS * 8 * 9, images * OUT * 6 * 7)


@pytest.mark.parametrize("kind", GROUPS)
def test_the_backward_is_given_the_inputs_alone(kind: str) -> None:
    given, saved = problem(kind), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        border_convolution(**given)
    assert set(saved) == {given[name].data_ptr() for name in LEAVES}


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((8, 3, 3, 3), 1),  # channels
        ((8, 4, 3, 2), 1),  # kernel
        ((8, 4, 9), 1),
        ((8, 4, 3, 3), 2),  # channels of a group
        ((7, 2, 3, 3), 2),  # outputs that the groups do not divide
        ((4, 4, 3, 3), 4),
        pytest.param((3, 1, 3, 3), 3),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(shape: tuple[int, ...], groups: int) -> None:
    given = problem() | {"weight": torch.zeros(shape), "bias": None, "groups": groups}
    named = f"weight {tuple(shape)} does not fit 4 channels in {groups} groups"
    with pytest.raises(ValueError, match=re.escape(named)):
        border_convolution(**given)


def test_the_borders_refusals_hold_here_too() -> None:
    with pytest.raises(ValueError, match="scale must be a scalar tensor"):
        border_convolution(**problem() | {"scale": torch.rand(2)})
    with pytest.raises(ValueError, match=r"alpha must be .* beside a fused border"):
        border_convolution(**problem() | {"border": None})
