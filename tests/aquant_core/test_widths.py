"""Which widths there are, what they cost, and the chain of assignments: by hand, and its laws."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquant_core.encoding import pack_codes
from aquant_core.widths import WIDTHS, Choice, Widths, chain, choices, raised, thinned, weight_bytes


@pytest.mark.parametrize(
    ("widths", "higher"),
    [
        ((2, 2), (4, 4)),
        ((3, 2), (4, 4)),
        ((2, 4), (4, 6)),
        ((4, 4), (6, 6)),
        ((5, 7), (6, 8)),
        ((6, 8), (8, 8)),
        ((8, 8), (8, 8)),
        ((32, 3), (32, 4)),
        ((32, 32), (32, 32)),
    ],
)
def test_raised(widths: Widths, higher: Widths) -> None:
    assert raised(widths) == higher


@pytest.mark.parametrize(
    ("lowest", "offered"),
    [
        ((2, 2), [(2, 2), (3, 3), (4, 4), (6, 6), (8, 8)]),
        ((2, 4), [(2, 4), (3, 4), (4, 4), (6, 6), (8, 8)]),
        ((5, 3), [(5, 3), (5, 4), (6, 6), (8, 8)]),
        ((3, 32), [(3, 32), (4, 32), (6, 32), (8, 32)]),
        ((8, 8), [(8, 8)]),
    ],
)
def test_choices(lowest: Widths, offered: list[Widths]) -> None:
    assert choices(lowest) == offered


@pytest.mark.parametrize(("numbers", "bits", "size"), [(54, 2, 14), (54, 4, 27), (3, 3, 2), (324, 2, 81), (10, 32, 40)])
def test_weight_bytes_by_hand(numbers: int, bits: int, size: int) -> None:
    assert weight_bytes(numbers, bits) == size


@given(st.integers(1, 300), st.integers(2, 8))
def test_weight_bytes_are_those_of_the_checkpoint(numbers: int, bits: int) -> None:
    assert weight_bytes(numbers, bits) == len(pack_codes(np.zeros(numbers), bits))


def layer(*choices: tuple[int, int, float]) -> list[Choice]:
    return [Choice((bits, bits), size, damage) for bits, size, damage in choices]


def test_a_chain_by_hand() -> None:
    # "a" saves 4 a byte at first (8 for 2 bytes), then 0.5; "b" is best raised to 4 bits at once: 3 for 2 bytes are
    # more a byte than 0.5 for 1.
    layers = {"a": layer((2, 2, 10.0), (3, 4, 2.0), (4, 6, 1.0)), "b": layer((2, 1, 4.0), (3, 2, 3.5), (4, 3, 1.0))}
    bits = [{name: choice.widths[0] for name, choice in step.items()} for step in chain(layers)]
    assert bits == [{"a": 2, "b": 2}, {"a": 3, "b": 2}, {"a": 3, "b": 4}, {"a": 4, "b": 4}]


def test_what_costs_no_byte_comes_first_and_what_only_hurts_last() -> None:
    layers = {
        "free": layer((2, 5, 1.0), (3, 5, 0.9)),
        "good": layer((2, 5, 9.0), (3, 6, 0.0)),
        "bad": layer((2, 5, 1.0), (3, 6, 2.0)),
    }
    raised_at = [{name for name, choice in step.items() if choice.widths[0] == 3} for step in chain(layers)]
    assert raised_at == [set(), {"free"}, {"free", "good"}, {"free", "good", "bad"}]


def rising(draws: list[tuple[int, float]]) -> list[Choice]:
    """A layer's choices, from steps of size and falling or rising damages."""
    size, choices_of_layer = 1, []
    for width, (step, damage) in zip(WIDTHS, draws, strict=False):
        size += step
        choices_of_layer.append(Choice((width, width), size, damage))
    return choices_of_layer


def offered(least_step: int) -> st.SearchStrategy[list[Choice]]:
    """A layer's choices, each by ``least_step`` bytes larger than the one before."""
    return st.lists(st.tuples(st.integers(least_step, 50), st.floats(0, 10)), min_size=1, max_size=5).map(rising)


LAYERS = st.dictionaries(st.sampled_from("abcdef"), offered(0), min_size=1)


@given(LAYERS)
def test_a_chain_leads_from_the_lowest_to_the_highest_and_no_layer_falls(layers: dict[str, list[Choice]]) -> None:
    assignments = chain(layers)
    assert assignments[0] == {name: choices_of[0] for name, choices_of in layers.items()}
    assert assignments[-1] == {name: choices_of[-1] for name, choices_of in layers.items()}
    for one, next_one in itertools.pairwise(assignments):
        changed = [name for name in layers if one[name] != next_one[name]]
        assert len(changed) == 1
        assert next_one[changed[0]].widths > one[changed[0]].widths
        assert next_one[changed[0]].size >= one[changed[0]].size


def falling(layer: list[Choice]) -> list[Choice]:
    """The same sizes, and no more damage at more bits."""
    damages = sorted((choice.damage for choice in layer), reverse=True)
    return [replace(choice, damage=damage) for choice, damage in zip(layer, damages, strict=True)]


@given(st.lists(st.builds(falling, offered(1)), min_size=1, max_size=3))
def test_no_assignment_within_its_bytes_has_less_damage(layers: list[list[Choice]]) -> None:
    everything = [total(assignment) for assignment in itertools.product(*layers)]
    for step in chain(dict(zip("abc", layers, strict=False))):
        size, damage = total(step.values())
        assert damage <= min(other for bytes_, other in everything if bytes_ <= size) + 1e-9


def total(assignment: Iterable[Choice]) -> tuple[int, float]:
    chosen = list(assignment)
    return sum(choice.size for choice in chosen), sum(choice.damage for choice in chosen)


@given(LAYERS, st.integers(2, 31))
def test_a_thinned_chain_keeps_both_ends_and_the_order(layers: dict[str, list[Choice]], count: int) -> None:
    whole = chain(layers)
    kept = thinned(whole, count)
    places = [next(index for index, one in enumerate(whole) if one is step) for step in kept]
    assert places == sorted(set(places))
    assert places[0] == 0
    assert places[-1] == len(whole) - 1
    assert len(kept) <= max(count, 2)


def test_thinned_by_hand() -> None:
    # 16 to 256 bytes in five: 16, 32, 64, 128, 256.
    whole = chain({"a": layer(*((16 + 8 * step, 16 + 8 * step, 1000 / (2 + step)) for step in range(31)))})
    assert [step["a"].size for step in thinned(whole, 5)] == [16, 32, 64, 128, 256]
