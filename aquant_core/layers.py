"""A quantized conv or linear layer: it quantizes its input, then multiplies (appendix B, fig. 1(b))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquant_core.border import Border
from aquant_core.config import BorderConfig
from aquant_core.quantizers import UniformGrid, WeightRounding, largest_code
from cupy_kernels.ops import border_columns
from cupy_kernels.specification import BorderSpecification, Window


@dataclass(frozen=True)
class Dropping:
    """QDrop's dropping of quantization: each element keeps its float value with ``probability``."""

    probability: float
    generator: torch.Generator

    def __call__(self, quantized: Tensor, float_values: Tensor) -> Tensor:
        """Mixes two tensors of one shape."""
        drawn = torch.rand(quantized.shape, generator=self.generator, device=quantized.device)
        return torch.where(drawn < self.probability, float_values, quantized)


class QuantizedLayer(nn.Module):
    """One conv2d or linear node with quantized weight and input.

    Attributes:
        weight: a ``WeightRounding``, or None for a float weight.
        activation_scale: s, learned; None for a float input.
        zero_point: z of the input.
        border: the border, or None for B = 1/2.
        rounding: alpha of the rounding schedule (appendix Eq. 2), 1 outside reconstruction.
        dropping: how quantized inputs are replaced by float ones while a block is reconstructed, or None.
    """

    weight: WeightRounding | None
    activation_scale: nn.Parameter | None
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
        self.weight_bits = self.activation_bits = 32
        self.register_parameter("activation_scale", None)
        self.zero_point = 0
        self.border: Border | None = None
        self.border_config = BorderConfig()
        self.rounding = 1.0
        self.dropping: Dropping | None = None

    def quantize_activation(self, grid: UniformGrid, bits: int) -> None:
        """From now on the input is quantized, rounded to nearest."""
        self.activation_scale = nn.Parameter(grid.scale.clone())
        self.zero_point = int(grid.zero_point)
        self.activation_bits = bits

    def add_border(self, config: BorderConfig) -> None:
        """Gives a quantized input an adaptive border, at first B = 1/2."""
        self.border_config = config
        self.border = Border(config, self.in_channels, self.window.positions)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.float_weight if self.weight is None else self.weight()
        if self.op == "linear":
            return F.linear(self._quantized_pixels(x), weight, self.bias)
        if self._border_by_position:
            return self._convolve_columns(x, weight)
        return F.conv2d(
            self._quantized_pixels(x),
            weight,
            self.bias,
            self.window.stride,
            self.window.padding,
            self.window.dilation,
            self.groups,
        )

    @property
    def _border_by_position(self) -> bool:
        """Whether a pixel's code depends on where in the window it stands."""
        return self.border is not None and self.border.coefficients.shape[2] > 1 and self.rounding > 0

    def _specification(self, fused: bool) -> BorderSpecification:
        config = self.border_config
        levels = largest_code(self.activation_bits)
        return BorderSpecification(levels, self.zero_point, config.bound, fused, config.input_gradient)

    def _quantized_pixels(self, x: Tensor) -> Tensor:
        """x_hat of x's own shape: for linear layers, one border per channel, no border, or a plain clip.

        While the rounding schedule is 0 the border does not matter, whatever its granularity. A convolution
        pads x_hat with 0, which is the code z.
        """
        scale = self.activation_scale
        if scale is None:
            return x
        features = x.shape[1] if self.op == "conv2d" else x.shape[-1]
        border = None
        if self.border is not None and self.rounding > 0:
            border = self.border.coefficients
        maps = x if self.op == "conv2d" else x.reshape(-1, features, 1, 1)
        spec = self._specification(fused=False)
        quantized = border_columns(maps, scale, border, None, Window(), spec, self.rounding).reshape(x.shape)
        return quantized if self.dropping is None else self.dropping(quantized, x)

    def _convolve_columns(self, x: Tensor, weight: Tensor) -> Tensor:
        """im2col with the border, then one matrix product a group."""
        assert self.border is not None
        assert self.activation_scale is not None
        spec = self._specification(self.border_config.fusion == "channel_mean")
        columns = border_columns(
            x,
            self.activation_scale,
            self.border.coefficients,
            self.border.alpha,
            self.window,
            spec,
            self.rounding,
        )  # (N, C K, L)
        images, windows = columns.shape[0], columns.shape[2]
        out_channels = weight.shape[0]
        matrix = weight.reshape(self.groups, out_channels // self.groups, -1)  # (G, O/G, C K/G)
        if self.groups == 1:
            # bmm over images: matmul would fold them into one product, and copy the columns for it.
            product = torch.bmm(matrix.expand(images, -1, -1), columns)  # (N, O, L)
        elif self.groups == self.in_channels == out_channels:  # depthwise: a weighted sum of the K positions
            product = (columns.reshape(images, out_channels, -1, windows) * matrix[:, 0, :, None]).sum(2)
        else:
            product = torch.matmul(matrix, columns.reshape(images, self.groups, -1, windows))  # (N, G, O/G, L)
        rows, width = self.window.output_size(x.shape[2], x.shape[3])
        product = product.reshape(images, out_channels, rows, width)
        return product if self.bias is None else product + self.bias.reshape(1, -1, 1, 1)

    @torch.no_grad()
    def project(self) -> None:
        """Puts the learned parameters back where they have a meaning: a positive step, alpha in [0, 1]."""
        if self.activation_scale is not None:
            self.activation_scale.clamp_(min=torch.finfo(torch.float32).tiny)
        if self.border is not None:
            self.border.project()

    @torch.no_grad()
    def finish(self) -> None:
        """Ends learning: weights are hard, the border has its stored precision, the schedule is over."""
        if self.weight is not None:
            self.weight.harden()
        if self.border is not None:
            self.border.round_to_stored_type()
        self.rounding, self.dropping = 1.0, None


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
