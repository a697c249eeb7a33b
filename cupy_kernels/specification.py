"""The words in which a border quantization is asked for, and the constants every implementation shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bound = Literal["steep", "stretched", "clip"]

NUMBER_OF_BOUND: dict[Bound, int] = {"steep": 0, "stretched": 1, "clip": 2}
"""By which compiled code knows it."""

# sigmoid(w) - 1/2 as one fixed sequence of fp32 operations, so that equal inputs give equal codes
# on every device:
#   w := clip(w, -LIMIT, LIMIT);  z := w w;  (w ((p2 z + p1) z + p0)) / ((q2 z + q1) z + 1)
# A minimax fit on the interval; it differs from the exact sigmoid by at most 5.6e-6.
SIGMOID_LIMIT = 8.0
SIGMOID_P0 = 0.24998705089092255
SIGMOID_P1 = 0.00655454583466053
SIGMOID_P2 = 1.182320647785673e-05
SIGMOID_Q1 = 0.10950659215450287
SIGMOID_Q2 = 0.0008509904146194458

SCALE_OF_BOUND = 2.5
"""Appendix B's factor: inside the sigmoid for ``steep``, outside it for ``stretched``."""


@dataclass(frozen=True)
class Window:
    """Geometry of a sliding window over a (N, C, H, W) map, as in ``nn.Unfold``; each pair is (y, x)."""

    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def positions(self) -> int:
        """Positions in one window, the paper's k^2."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def is_pixel(self) -> bool:
        """Whether each window is one pixel, each pixel once: columns are then the map itself."""
        return self == Window()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows over a (height, width) map.

        Raises:
            ValueError: the window does not fit into the padded map.
        """
        sizes = []
        for axis, extent in enumerate((height, width)):
            span = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            size = (extent + 2 * self.padding[axis] - span) // self.stride[axis] + 1
            if size < 1:
                raise ValueError(
                    f"a window of {self.kernel_size} (padding {self.padding}, dilation {self.dilation}) "
                    f"does not fit into a map of {(height, width)}"
                )
            sizes.append(size)
        return sizes[0], sizes[1]


@dataclass(frozen=True)
class BorderSpecification:
    """What is static about one layer's activation quantization.

    Attributes:
        levels: the largest code, 2^M - 1.
        zero_point: z, the code that stands for 0.
        bound: how the learned shift e is kept within half a step.
        fused: Eq. 9: one border per input channel and window, the mean over its positions.
        input_gradient: whether the border's dependence on x and s carries gradient.
    """

    levels: int
    zero_point: int = 0
    bound: Bound = "steep"
    fused: bool = True
    input_gradient: bool = True
