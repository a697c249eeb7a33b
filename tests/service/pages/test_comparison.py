"""Two reports beside each other: the arithmetic by hand, and what does not compare."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from old_reports import old_report

from aquant_core.config import LayerOverride
from aquant_core.report.schema import LayerSqnr, Report, SensitiveLayer, Sensitivity
from service.pages.comparison import Score, compare, difference_interval

NAMES = ("A", "B")


def reports() -> tuple[Report, Report]:
    return Report.model_validate(old_report()), Report.model_validate(old_report())


def test_newcombes_interval_is_that_of_his_paper() -> None:
    """Newcombe 1998, table II, (a): 56/70 less 48/80, method 10: 0.0524 to 0.3339."""
    first = Score(48 / 80, [0.4904, 0.7004], 80)  # Wilson
    second = Score(56 / 70, [0.6919, 0.8771], 70)
    interval = difference_interval(first, second)
    assert interval is not None
    assert interval == pytest.approx((0.0524, 0.3339), abs=2e-4)


fractions = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted)


@given(fractions, fractions)
def test_the_interval_holds_the_difference_and_turns_with_the_order(a: list[float], b: list[float]) -> None:
    first, second = Score(a[1], [a[0], a[2]], 9), Score(b[1], [b[0], b[2]], 9)
    forth, back = difference_interval(first, second), difference_interval(second, first)
    assert forth is not None
    assert back is not None
    assert forth[0] - 1e-12 <= second.value - first.value <= forth[1] + 1e-12
    assert forth == pytest.approx((-back[1], -back[0]))


def test_the_same_report_does_not_differ() -> None:
    found = compare(*reports(), NAMES)
    assert found.metric == "Top-1 accuracy"
    assert found.gain == 0
    assert found.cautions == []
    assert not any(pair.has_other_bits for pair in found.layers)


def test_what_does_not_compare_is_said() -> None:
    first, second = reports()
    second.digests = dict.fromkeys(second.digests, "another")
    second.protocol = {"name": "qdrop"}
    found = compare(first, second, NAMES)
    assert found.gain is None
    assert found.interval is None
    assert len(found.cautions) == 4


def test_without_labels_in_both_it_is_the_agreement_that_counts() -> None:
    first, second = reports()
    second.accuracy = None
    found = compare(first, second, NAMES)
    assert found.metric == "Agreement with the float network"
    assert found.first.value == first.fidelity.quantized.agreement


def test_what_was_said_of_a_gain_is_told_of_that_layer_alone() -> None:
    first, second = reports()
    worst = SensitiveLayer(
        layer=first.layers[1].name, bits=[2, 2], raised_bits=[4, 4], gain=0.0017, interval=[-0.0066, 0.0102],
        cost_bytes=1,
    )  # fmt: skip
    first.sensitivity = Sensitivity(metric="top1", n=100, layers=[worst])
    assert compare(first, second, NAMES).promise is None
    raised = second.layers[1]
    raised.weight_bits, raised.activation_bits = 4, 4
    promise = compare(first, second, NAMES).promise
    assert promise is not None
    assert (promise.layer, promise.bits, promise.gain) == (raised.name, (4, 4), 0.0017)
    assert promise.interval == [-0.0066, 0.0102]
    assert compare(second, first, NAMES).promise is None
    second.config = second.config.model_copy(update={"layers": {raised.name: LayerOverride(weight_bits=4)}})
    assert compare(first, second, NAMES).promise is not None
    for change in ({"seed": 9}, {"activation_bits": 4}, {"preset": "paper"}):
        other = second.model_copy(update={"config": second.config.model_copy(update=change)})
        assert compare(first, other, NAMES).promise is None
    for changes in ({"metric": "agreement"}, {"layers": [worst.model_copy(update={"raised_bits": [4, 2]})]}):
        without = first.model_copy(update={"sensitivity": first.sensitivity.model_copy(update=changes)})
        assert compare(without, second, NAMES).promise is None
    second.layers[2].weight_bits = 4
    assert compare(first, second, NAMES).promise is None


def test_layers_are_paired_by_name() -> None:
    first, second = reports()
    first.layers[0].sqnr_db = LayerSqnr(weight=None, input=None, output=10.0)
    second.layers[0].sqnr_db = LayerSqnr(weight=None, input=None, output=13.5)
    second.layers[0].weight_bits = 3
    gone = second.layers.pop(1)
    added = gone.model_copy(update={"name": "new"})
    second.layers.append(added)
    pairs = compare(first, second, NAMES).layers
    assert [pair.name for pair in pairs] == [*(layer.name for layer in first.layers), "new"]
    assert (pairs[0].gain_db, pairs[0].has_other_bits) == (3.5, True)
    assert (pairs[1].second, pairs[1].gain_db, pairs[1].has_other_bits) == (None, None, True)
    assert pairs[-1].first is None
    assert not pairs[2].has_other_bits
