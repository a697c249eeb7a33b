"""Accuracy, its interval, and likeness to the float network, against numbers worked out by hand."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aquant_core.evaluation import (
    accuracy,
    decisions_to_meet,
    evaluation_batch_size,
    fidelity,
    independent_difference,
    logits_digest,
    logits_of,
    paired_difference,
    sqnr_db,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("fraction", "count", "low", "high"),
    [
        (0.5, 100, 0.403832, 0.596168),  # (0.5 + 0.019207 -+ 1.96 sqrt(0.0025 + 0.000096)) / 1.038415
        (0.8, 10, 0.490162, 0.943318),
        (0.0, 10, 0.0, 0.277533),  # z^2 / (n + z^2)
        (1.0, 10, 0.722467, 1.0),
    ],
)
def test_wilson_by_hand(fraction: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(fraction, count) == pytest.approx((low, high), abs=2e-6)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_fraction_within_0_and_1(trials: tuple[int, int]) -> None:
    hits, count = trials
    low, high = wilson_interval(hits / count, count)
    assert -1e-12 <= low <= hits / count + 1e-12
    assert hits / count - 1e-12 <= high <= 1 + 1e-12
    mirrored = wilson_interval(1 - hits / count, count)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_top_1_and_top_5() -> None:
    ranks = torch.arange(8, 0, -1.0)  # class 0 is likeliest, class 7 least likely
    logits = ranks.repeat(4, 1)
    result = accuracy(logits, torch.tensor([0, 4, 5, 7]))
    assert (result["top1"], result["top5"], result["n"]) == (0.25, 0.5, 4)
    assert result["interval"] == [pytest.approx(value, abs=2e-6) for value in wilson_interval(0.25, 4)]


def test_fewer_than_five_classes() -> None:
    result = accuracy(torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 2.0]]), torch.tensor([1, 1]))
    assert (result["top1"], result["top5"]) == (0.5, 1.0)


def test_fidelity_by_hand() -> None:
    exact = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    result = fidelity(torch.tensor([[4.0, 3.0], [1.0, 0.0]]), exact)
    # Cosines 24/25 and 1; energy 26 over error 2.
    interval = result.pop("interval")
    assert result == {"agreement": 0.5, "cosine": 0.98, "sqnr_db": 11.139, "n": 2}
    assert interval == pytest.approx(wilson_interval(0.5, 2), abs=1e-6)


def test_sqnr() -> None:
    exact = torch.tensor([[1.0, -1.0]])
    assert sqnr_db(exact * 1.1, exact) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(exact * 2, exact) == pytest.approx(0.0)
    assert sqnr_db(exact, exact) == 200.0


def test_digest_is_of_little_endian_floats() -> None:
    logits = torch.tensor([[1.0, -2.5], [0.0, 3.0]])
    expected = hashlib.sha256(struct.pack("<4f", 1.0, -2.5, 0.0, 3.0)).hexdigest()
    assert logits_digest(logits) == expected
    assert logits_digest(logits.t().contiguous().t()) == expected
    assert logits_digest(logits + torch.finfo(torch.float32).eps * 4) != expected


@pytest.mark.parametrize(("size", "batch"), [((32, 32), 256), ((64, 64), 256), ((65, 64), 32), ((224, 224), 32)])
def test_batch_size_is_set_by_image_size_alone(size: tuple[int, int], batch: int) -> None:
    assert evaluation_batch_size(torch.empty(1, 3, *size, device="meta")) == batch


def test_logits_are_in_order_whatever_the_batches() -> None:
    images = torch.arange(70.0).reshape(70, 1, 1, 1).expand(70, 1, 65, 64)
    sizes = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch[:, :, :1, :2]

    logits = logits_of(model, images)
    assert sizes == [32, 32, 6]
    assert logits.shape == (70, 2)
    assert torch.equal(logits[:, 0], torch.arange(70.0))


def test_paired_difference_by_hand() -> None:
    ours = torch.tensor([True] * 90 + [False] * 10)
    theirs = torch.tensor([True] * 80 + [False] * 12 + [True] * 8)
    # 10 gained, 8 lost: centre 2 / 102, spread 1.96 sqrt(18 + 1 - 4 / 102) / 102.
    assert paired_difference(ours, theirs) == pytest.approx((0.02, -0.064068, 0.103284), abs=1e-5)
    reverse = paired_difference(theirs, ours)
    assert reverse == pytest.approx((-0.02, -0.103284, 0.064068), abs=1e-5)
    same = paired_difference(ours, ours)
    assert same[0] == 0
    assert same[1] == -same[2] == pytest.approx(-1.959964 / 102)  # equal decisions on 100 images prove little


def test_independent_difference_by_hand() -> None:
    # Newcombe's example (a) of 1998: 56 of 70 against 48 of 80.
    assert independent_difference(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert independent_difference(48 / 80, 80, 56 / 70, 70) == pytest.approx((-0.3339, -0.0524), abs=5e-5)


def test_noise_without_end_is_no_error() -> None:
    assert sqnr_db(torch.tensor([float("inf")]), torch.tensor([1.0])) == -float("inf")


def test_decisions_to_meet_are_the_labels_or_the_float_networks() -> None:
    logits, labels = torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([0, 0])
    assert decisions_to_meet(logits, labels) == ("top1", labels)
    metric, wanted = decisions_to_meet(logits, None)
    assert metric == "agreement"
    assert wanted.tolist() == [1, 0]
