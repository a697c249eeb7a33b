"""How a checkpoint's numbers are stored: weight codes as a dense bit string, borders in fp16 or 8 bits; numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LARGEST_CODE, LARGEST_ALPHA_CODE = 127, 255
"""Of border parameters in 8 bits: signed, and of alpha in [0, 1]."""

_LEAST_STEP = np.float32(2.0**-14)  # fp16's least normal number: above it, a step has all its bits


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes below 2^bits as a dense bit string, lowest bit first: uint8 of ceil(n bits / 8) bytes."""
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1, 1)
    return np.packbits(np.unpackbits(flat, axis=1, bitorder="little")[:, :bits], bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of ``pack_codes``: ``count`` codes, uint8."""
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(stream, axis=1, bitorder="little")[:, 0]


def encode_border(
    coefficients: np.ndarray, alpha: np.ndarray | None, bits: int
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Border parameters as they are stored.

    In 8 bits each of b0, b1, b2 has one step for the whole layer: the largest magnitude over 127, an fp16 number, so
    that code times step is exact in fp32 and what was decoded is encoded the same again.

    Args:
        coefficients: (P, C, K) float32.
        alpha: (C, K) float32 in [0, 1], or None.
        bits: 16 or 8.

    Returns:
        Tensors by the ending of their names, and steps. In 16 bits ``border`` and, if there is one, ``alpha`` are
        float16, and there are no steps; in 8 bits ``border`` is int8 with P steps, ``alpha`` uint8 in 255ths.
    """
    limit = np.float32(np.finfo(np.float16).max)
    if bits == 16:
        stored = {"border": np.clip(coefficients, -limit, limit).astype(np.float16)}
        return stored if alpha is None else stored | {"alpha": alpha.astype(np.float16)}, []
    largest = np.abs(coefficients).max(axis=(1, 2))  # (P,)
    steps = np.clip(largest / np.float32(LARGEST_CODE), _LEAST_STEP, limit).astype(np.float16)
    codes = np.rint(coefficients / steps.astype(np.float32)[:, None, None])
    codes = np.nan_to_num(np.clip(codes, -LARGEST_CODE, LARGEST_CODE))  # of NaN, the step tells
    stored = {"border": codes.astype(np.int8)}
    if alpha is not None:
        stored["alpha"] = np.rint(alpha * LARGEST_ALPHA_CODE).astype(np.uint8)
    return stored, steps.tolist()


def decode_border(stored: Mapping[str, np.ndarray], steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
    """The inverse of ``encode_border``: float32 coefficients (P, C, K) and alpha (C, K) or None."""
    coefficients, alpha = stored["border"].astype(np.float32), stored.get("alpha")
    if steps:
        coefficients *= np.array(steps, np.float32)[:, None, None]
    if alpha is not None:
        alpha = alpha.astype(np.float32) / np.float32(LARGEST_ALPHA_CODE if alpha.dtype == np.uint8 else 1)
    return coefficients, alpha
