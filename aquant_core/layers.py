"""A quantized conv or linear layer: it quantizes its input, then multiplies (appendix B, fig. 1(b))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquant_core.a_rounding import a_rounded_convolution
from aquant_core.border import Border
from aquant_core.config import FLOAT_BITS, BorderConfig
from aquant_core.quantizers import UniformGrid, WeightRounding, largest_code
from cupy_kernels.convolution import border_convolution
from cupy_kernels.ops import border_columns
from cupy_kernels.specification import BorderSpecification, Window


@dataclass(frozen=True)
class Dropping:
    """QDrop's dropping of quantization: each element keeps its float value with ``probability``, in 256ths."""

    probability: float
    generator: torch.Generator

    def __call__(self, quantized: Tensor, float_values: Tensor) -> Tensor:
        """Mixes two tensors of one shape."""
        if self.probability >= 1:
            return float_values
        count = quantized.numel()
        # One random byte an element, eight from each draw: a float each would cost as much as a small convolution.
        words = torch.empty((count + 7) // 8, dtype=torch.int64, device=quantized.device)
        drawn = words.random_(-(2**63), None, generator=self.generator).view(torch.uint8)[:count]
        kept = (drawn < round(256 * self.probability)).view(quantized.shape)
        return torch.where(kept, float_values, quantized)


class ActivationQuantizer(nn.Module):
    """Quantizes a value: x_hat = s (q - z), with a border or rounded to nearest.

    Attributes:
        activation_scale: s, learned; None where the value stays float.
        zero_point: z.
        border: the border, or None for B = 1/2.
        rounding: alpha of the rounding schedule (appendix Eq. 2), 1 outside reconstruction. While it is 0 it must be
            the number, since a tensor's value is not looked at.
        dropping: how quantized values are replaced by float ones while a block is reconstructed, or None.
    """

    activation_scale: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.activation_bits = FLOAT_BITS
        self.register_parameter("activation_scale", None)
        self.zero_point = 0
        self.border: Border | None = None
        self.border_config = BorderConfig()
        self.rounding: float | Tensor = 1.0
        self.dropping: Dropping | None = None

    def quantize_activation(self, grid: UniformGrid, bits: int, device: torch.device | None = None) -> None:
        """From now on the value is quantized, rounded to nearest."""
        self.activation_scale = nn.Parameter(grid.scale.to(device or grid.scale.device, copy=True))
        self.zero_point = int(grid.zero_point)
        self.activation_bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """x_hat of x's own shape: (N, C, H, W), with one border per channel or none, or any other with none.

        While the rounding schedule is 0 the border does not matter, whatever its granularity.
        """
        scale = self.activation_scale
        if scale is None or not len(x):  # no images
            return x
        border = self.border.coefficients if self.border is not None and self._rounds else None
        maps = x if x.dim() == 4 else x.reshape(-1, x.shape[-1], 1, 1)
        spec = self.specification(fused=False)
        quantized = border_columns(maps, scale, border, None, Window(), spec, self.rounding).reshape(x.shape)
        return quantized if self.dropping is None else self.dropping(quantized, x)

    @property
    def _rounds(self) -> bool:
        """Whether the rounding schedule has left 0."""
        return isinstance(self.rounding, Tensor) or self.rounding > 0

    def specification(self, fused: bool) -> BorderSpecification:
        """The static part of its quantization."""
        config = self.border_config
        levels = largest_code(self.activation_bits)
        return BorderSpecification(levels, self.zero_point, config.bound, fused, config.input_gradient)

    @torch.no_grad()
    def project(self) -> None:
        """Puts the learned parameters back where they have a meaning: a positive step, alpha in [0, 1]."""
        if self.activation_scale is not None:
            self.activation_scale.clamp_(min=torch.finfo(torch.float32).tiny)
        if self.border is not None:
            self.border.project()

    @torch.no_grad()
    def finish(self) -> None:
        """Ends learning: the border has its stored precision, the schedule is over."""
        if self.border is not None:
            self.border.round_to_stored()
        self.rounding, self.dropping = 1.0, None


class QuantizedLayer(ActivationQuantizer):
    """One conv2d or linear node with quantized weight, and quantized input unless that is quantized where it is made.

    Attributes:
        weight: a ``WeightRounding``, or None for a float weight.
        a_rounding: whether the input's roundings are flipped window by window (appendix A); it has no border then.
    """

    weight: WeightRounding | None
    bias: Tensor | None
    float_weight: Tensor

    def __init__(self, op: str, attributes: dict[str, Any], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.op = op
        self.groups = int(attributes.get("groups", 1))
        self.window = Window()
        if op == "conv2d":
            self.window = Window(
                (int(weight.shape[2]), int(weight.shape[3])),
                _pair(attributes["stride"]),
                _pair(attributes["padding"]),
                _pair(attributes["dilation"]),
            )
        self.in_channels = int(weight.shape[1]) * self.groups
        self.register_buffer("float_weight", weight)
        self.register_buffer("bias", bias)
        self.weight = None
        self.weight_bits = FLOAT_BITS
        self.a_rounding = False

    def quantize_activation(self, grid: UniformGrid, bits: int, device: torch.device | None = None) -> None:
        super().quantize_activation(grid, bits, device or self.float_weight.device)

    def add_border(self, config: BorderConfig) -> Border:
        """Gives a quantized input an adaptive border, at first B = 1/2."""
        self.border_config = config
        self.border = Border(config, self.in_channels, self.window.positions).to(self.float_weight.device)
        return self.border

    def forward(self, x: Tensor) -> Tensor:
        weight = self.float_weight if self.weight is None else self.weight()
        if self.a_rounding and self.activation_scale is not None:
            quantizer = UniformGrid(
                self.activation_scale, torch.tensor(self.zero_point), largest_code(self.activation_bits)
            )
            return a_rounded_convolution(x, quantizer, weight, self.bias, self.window, self.groups)
        if self.op == "linear":
            rows = x.reshape(-1, x.shape[-1], 1, 1)  # a border per feature, wherever the features stand
            return F.linear(super().forward(rows).reshape(x.shape), weight, self.bias)
        if self.has_border_by_position and self._rounds:
            return self._convolve_columns(x, weight)
        return F.conv2d(  # it pads x_hat with 0, which is the code z
            super().forward(x),
            weight,
            self.bias,
            self.window.stride,
            self.window.padding,
            self.window.dilation,
            self.groups,
        )

    @property
    def has_border_by_position(self) -> bool:
        """Whether a pixel's code depends on where in the window it stands."""
        return self.border is not None and self.border.coefficients.shape[2] > 1

    @property
    def is_fused(self) -> bool:
        """Eq. 9: whether the positions of a window share the mean of their borders."""
        return self.has_border_by_position and self.border_config.fusion == "channel_mean"

    def _convolve_columns(self, x: Tensor, weight: Tensor) -> Tensor:
        """The border by position of the window, and the product with the weight."""
        assert self.border is not None
        assert self.activation_scale is not None
        spec = self.specification(self.is_fused)
        return border_convolution(
            x,
            self.activation_scale,
            self.border.coefficients,
            self.border.alpha,
            weight,
            self.bias,
            self.window,
            self.groups,
            spec,
            self.rounding,
        )

    def finish(self) -> None:
        """Ends learning: weights are hard, the border has its stored precision, the schedule is over."""
        if self.weight is not None:
            self.weight.harden()
        super().finish()


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
