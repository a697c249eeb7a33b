"""The adaptive rounding border of one layer: its parameters, and what they may be."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from aquant_core.config import BorderConfig
from aquant_core.encoding import decode_border, encode_border


class Border(nn.Module):
    """Parameters of Eq. 8 and Eq. 9 for one layer, 0 at the start, so that B = 1/2.

    Attributes:
        coefficients: (P, C, K): b0, b1 (and b2 for ``quadratic``) of each input channel and im2col position;
            K = 1 for ``channel`` granularity.
        alpha: (C, K) weights of the channel mean, or None where they are fixed at 1.
        bits: in which a parameter is stored.
    """

    alpha: nn.Parameter | None

    def __init__(self, config: BorderConfig, channels: int, positions: int) -> None:
        super().__init__()
        self.bits = config.bits
        kept = positions if config.granularity == "position" else 1
        terms = 3 if config.form == "quadratic" else 2
        self.coefficients = nn.Parameter(torch.zeros(terms, channels, kept))
        # With one position the mean is the position itself and alpha would only rescale the coefficients.
        learned = config.alpha == "learned" and kept > 1
        self.register_parameter("alpha", nn.Parameter(torch.ones(channels, kept)) if learned else None)

    def tensors(self) -> list[Tensor]:
        """The parameters that exist, coefficients first."""
        return [self.coefficients] if self.alpha is None else [self.coefficients, self.alpha]

    def number_of_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    @torch.no_grad()
    def project(self) -> None:
        """Keeps alpha in [0, 1], so that the mean of bounded shifts stays bounded."""
        if self.alpha is not None:
            self.alpha.clamp_(0, 1)

    def stored(self) -> tuple[dict[str, np.ndarray], list[float]]:
        """The parameters as they are stored, and their steps (``encoding.encode_border``)."""
        alpha = None if self.alpha is None else self.alpha.detach().cpu().numpy()
        return encode_border(self.coefficients.detach().cpu().numpy(), alpha, self.bits)

    @torch.no_grad()
    def restore(self, coefficients: np.ndarray, alpha: np.ndarray | None) -> None:
        """Takes the parameters of ``encoding.decode_border``."""
        self.coefficients.copy_(torch.from_numpy(coefficients))
        if self.alpha is not None:
            assert alpha is not None
            self.alpha.copy_(torch.from_numpy(alpha))

    def round_to_stored(self) -> None:
        """Rounds the parameters, so that what is stored is what was evaluated."""
        self.restore(*decode_border(*self.stored()))
