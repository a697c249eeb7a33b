"""How numbers are stored: nothing is lost at 2 to 8 bits, and a border in 8 bits is what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from aquant_core.encoding import decode_border, encode_border, pack_codes, unpack_codes

BORDERS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(2, 3), st.integers(1, 5), st.integers(1, 9)),
    elements=st.floats(-1e5, 1e5, width=32) | st.floats(-1, 1, width=32),
)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_packing_comes_back(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack_codes(np.array(codes, dtype=np.float32), bits)
    assert packed.dtype == np.uint8
    assert packed.size == (len(codes) * bits + 7) // 8
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_packing_is_one_long_number(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    number = sum(code << (bits * index) for index, code in enumerate(codes))
    assert pack_codes(np.array(codes), bits).tobytes() == number.to_bytes((len(codes) * bits + 7) // 8, "little")


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [1, 2, 3, 0], [0b00_11_10_01]),
        (3, [5, 3, 7], [0b11_011_101, 0b1]),
        (4, [10, 3], [0b0011_1010]),
        (8, [255, 1], [255, 1]),
    ],
)
def test_packing_by_hand(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack_codes(np.array(codes), bits).tolist() == packed


@settings(max_examples=100, deadline=None)
@given(BORDERS, st.sampled_from([16, 8]), st.booleans())
def test_a_border_that_was_stored_is_stored_the_same_again(coefficients: np.ndarray, bits: int, learned: bool) -> None:
    alpha = np.linspace(0, 1, coefficients[0].size, dtype=np.float32).reshape(coefficients[0].shape)
    stored, steps = encode_border(coefficients, alpha if learned else None, bits)
    decoded = decode_border(stored, steps)
    again, same_steps = encode_border(*decoded, bits)
    assert steps == same_steps
    assert stored.keys() == again.keys() == ({"border", "alpha"} if learned else {"border"})
    assert all(np.array_equal(stored[kind], again[kind]) for kind in stored)
    assert decoded[0].dtype == np.float32
    if learned:
        assert decoded[1] is not None
        assert decoded[1].dtype == np.float32
        assert np.abs(decoded[1] - alpha).max() <= (0.5 / 255 + 1e-7 if bits == 8 else 2**-12)


@settings(max_examples=100, deadline=None)
@given(BORDERS)
def test_8_bits_are_off_by_half_a_step_at_most(coefficients: np.ndarray) -> None:
    stored, steps = encode_border(coefficients, None, 8)
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"border": np.int8}
    assert len(steps) == len(coefficients)
    decoded, _ = decode_border(stored, steps)
    for term, step in enumerate(steps):
        largest = np.abs(coefficients[term]).max()
        # The step is the largest magnitude over 127 but for its own rounding to fp16, or fp16's least normal number.
        assert 2.0**-14 <= step <= max(largest / 127 * (1 + 2**-11), 2.0**-14)
        assert np.abs(decoded[term] - coefficients[term]).max() <= step / 2 + largest * 2**-11
        assert np.abs(stored["border"][term]).max() == 127 or step == 2.0**-14


def test_8_bits_by_hand() -> None:
    coefficients = np.array([[[127.0, 0.49, -0.51]], [[0.0, 0.0, 0.0]]], np.float32)
    stored, steps = encode_border(coefficients, np.array([[0.0, 0.5, 1.0]], np.float32), 8)
    assert steps == [1.0, 2.0**-14]
    assert stored["border"].tolist() == [[[127, 0, -1]], [[0, 0, 0]]]
    assert stored["alpha"].tolist() == [[0, 128, 255]]
    coefficients, alpha = decode_border(stored, steps)
    assert coefficients.tolist() == [[[127.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]]]
    assert alpha is not None
    assert alpha[0].tolist() == [0.0, np.float32(128) / np.float32(255), 1.0]


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_not_finite_ends_at_the_largest_or_stays_unknown(bits: int) -> None:
    coefficients = np.array([[[np.inf, -np.inf, 1.0]], [[np.nan, 1.0, 2.0]]], np.float32)
    decoded, _ = decode_border(*encode_border(coefficients, None, bits))
    assert decoded[0, 0, 0] == -decoded[0, 0, 1] > 60_000
    assert np.isnan(decoded[1, 0, 0])
