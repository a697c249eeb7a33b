"""Bit widths to choose from: what they cost a layer, and in which order layers are best raised."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTHS = (2, 3, 4, 6, 8)
"""What is chosen from; 5 and 7 bits are taken where a configuration names them, and left out here."""

Widths = tuple[int, int]
"""Bits of a layer's weight and of its input."""


def at_least(widths: Widths, floor: int) -> Widths:
    """Both widths, no lower than ``floor``; float stays float."""
    return max(widths[0], floor), max(widths[1], floor)


def raised(widths: Widths) -> Widths:
    """What a layer is tried at: each width at 4 bits, or where it has 4 at the next of ``WIDTHS``; 8 and float stay."""
    weight, activation = (next((w for w in WIDTHS if w > max(bits, 3)), bits) for bits in widths)
    return weight, activation


def choices(lowest: Widths) -> list[Widths]:
    """What a layer may have that has ``lowest`` at least, in rising order.

    Weights and input go up together: inputs cost no bytes, so by size alone they would always have 8 bits.
    """
    return list(dict.fromkeys([lowest, *(at_least(lowest, floor) for floor in WIDTHS)]))


def weight_bytes(numbers: int, bits: int) -> int:
    """Bytes of a layer's weights in the checkpoint: its codes are a dense bit string."""
    return (numbers * bits + 7) // 8


@dataclass(frozen=True)
class Choice:
    """One layer at certain widths.

    Attributes:
        widths: of weight and input.
        size: bytes of its weights.
        damage: what it alone does to the float network's outputs; damages of several layers add up.
    """

    widths: Widths
    size: int
    damage: float


def chain(layers: Mapping[str, Sequence[Choice]]) -> list[dict[str, Choice]]:
    """Assignments of widths, from the lowest choice for every layer to the highest, in each step one layer higher.

    Every step is the one that takes away most damage for a byte, on the layer's convex hull; so each assignment has the
    least sum of damages that its bytes can have (as in a continuous knapsack), and none has a layer lower than the one
    before.

    Args:
        layers: each layer's choices, in rising order.
    """
    steps: list[tuple[float, str, Choice]] = []
    for name, offered in layers.items():
        at = 0
        while at + 1 < len(offered):
            ahead = range(at + 1, len(offered))
            best = max(ahead, key=lambda index: (_saving(offered[at], offered[index]), index))
            steps.append((_saving(offered[at], offered[best]), name, offered[best]))
            at = best
    assignment = {name: offered[0] for name, offered in layers.items()}
    assignments = [assignment]
    for _, name, choice in sorted(steps, key=lambda step: -step[0]):
        assignment = assignment | {name: choice}
        assignments.append(assignment)
    return assignments


def thinned(assignments: Sequence[dict[str, Choice]], count: int) -> list[dict[str, Choice]]:
    """At most ``count`` of a chain, the first and the last among them, each by the same factor larger than the last."""
    sizes = [sum(choice.size for choice in assignment.values()) for assignment in assignments]
    smallest, largest = max(sizes[0], 1), max(sizes[-1], 1)
    wanted = [round(smallest * (largest / smallest) ** (step / (count - 1))) for step in range(1, count - 1)]
    kept = {0, *(bisect.bisect_left(sizes, size) for size in wanted), len(sizes) - 1}
    return [assignments[index] for index in sorted(kept) if index < len(sizes)]


def _saving(low: Choice, high: Choice) -> float:
    """Damage that goes away for a byte more."""
    less, more = low.damage - high.damage, high.size - low.size
    return less / more if more else math.copysign(math.inf, less)
