"""Two jobs side by side, by their reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from aquant_core.report.plots import Bar, accuracy_bars
from aquant_core.report.schema import Layer, Report


@dataclass(frozen=True)
class LayerPair:
    """One layer in both jobs; None where a job does not have it."""

    name: str
    first: Layer | None
    second: Layer | None

    @property
    def gain_db(self) -> float | None:
        """How much better the second's output is."""
        first, second = (
            None if layer is None or layer.sqnr_db is None else layer.sqnr_db.output
            for layer in (self.first, self.second)
        )
        return None if first is None or second is None else second - first

    @property
    def has_other_bits(self) -> bool:
        """Whether the two give it different widths."""
        if self.first is None or self.second is None:
            return True
        widths = [(layer.weight_bits, layer.activation_bits) for layer in (self.first, self.second)]
        return widths[0] != widths[1]


@dataclass(frozen=True)
class Score:
    """The measure that both reports have, of one of them."""

    value: float
    interval: list[float] | None
    n: int


@dataclass(frozen=True)
class Promise:
    """What the first's report said that raising a layer would gain, which the second has raised and nothing else."""

    layer: str
    bits: tuple[int, int]
    gain: float
    interval: list[float]


@dataclass(frozen=True)
class Comparison:
    """What two reports say of the same.

    Attributes:
        metric: top-1 accuracy, or without labels in both the agreement with the float network.
        gain: the second's less the first's; None where that would compare different images.
        interval: 95 %, of two independent samples; None without one.
        promise: what the first's report said of that gain, where it did.
        cautions: why the two cannot simply be compared.
    """

    metric: str
    first: Score
    second: Score
    gain: float | None
    interval: tuple[float, float] | None
    promise: Promise | None
    cautions: list[str]
    layers: list[LayerPair]
    plot: Markup


def compare(first: Report, second: Report, names: tuple[str, str]) -> Comparison:
    """Put two reports beside each other."""
    labelled = first.accuracy is not None and second.accuracy is not None
    scores = _score(first, labelled), _score(second, labelled)
    cautions = []
    same_images = first.digests.get("evaluation") == second.digests.get("evaluation")
    if not same_images:
        cautions.append("They were evaluated on different images: their accuracies do not compare.")
    if first.digests.get("model") != second.digests.get("model"):
        cautions.append("They are of different networks.")
    if first.digests.get("calibration") != second.digests.get("calibration"):
        cautions.append("They were calibrated on different images.")
    if first.protocol != second.protocol:
        cautions.append("Their protocols differ: what is kept at more bits is not the same.")
    bars = [
        Bar(name, score.value, score.interval or [score.value] * 2, "chosen")
        for name, score in zip(names, scores, strict=True)
    ]
    metric = "Top-1 accuracy" if labelled else "Agreement with the float network"
    return Comparison(
        metric,
        *scores,
        scores[1].value - scores[0].value if same_images else None,
        difference_interval(*scores) if same_images else None,
        None if cautions else _promise(first, second, "top1" if labelled else "agreement"),
        cautions,
        _pairs(first, second),
        accuracy_bars(bars, metric, "scores"),
    )


def difference_interval(first: Score, second: Score) -> tuple[float, float] | None:
    """Of ``second - first``, from the Wilson intervals of the two (Newcombe 1998, method 10).

    It takes the two for independent samples. On the same images they are not, so it is wider than an interval paired
    by image, for which the reports do not have the single decisions.
    """
    if first.interval is None or second.interval is None:
        return None
    (low_1, high_1), (low_2, high_2) = first.interval, second.interval
    difference = second.value - first.value
    down = math.hypot(second.value - low_2, high_1 - first.value)
    up = math.hypot(high_2 - second.value, first.value - low_1)
    return difference - down, difference + up


def _score(report: Report, labelled: bool) -> Score:
    if labelled:
        assert report.accuracy is not None
        of = report.accuracy.quantized
        return Score(of.top1, of.interval, of.n)
    like = report.fidelity.quantized
    return Score(like.agreement, like.interval, like.n)


_WHAT_MAKES_WIDTHS = {"layers", "target"}
_WHAT_MAKES_NO_NETWORK = {"compare", "sensitivity", "dry_run"}


def _promise(first: Report, second: Report, metric: str) -> Promise | None:
    if first.sensitivity is None or first.sensitivity.metric != metric:
        return None
    beside_the_layers = _WHAT_MAKES_WIDTHS | _WHAT_MAKES_NO_NETWORK
    if first.config.model_dump(exclude=beside_the_layers) != second.config.model_dump(exclude=beside_the_layers):
        return None
    others = [pair for pair in _pairs(first, second) if pair.has_other_bits]
    if len(others) != 1 or others[0].second is None:
        return None
    raised = others[0].second
    for said in first.sensitivity.layers:
        if said.layer == raised.name and said.raised_bits == [raised.weight_bits, raised.activation_bits]:
            return Promise(said.layer, (raised.weight_bits, raised.activation_bits), said.gain, said.interval)
    return None


def _pairs(first: Report, second: Report) -> list[LayerPair]:
    """All layers in the first network's order, then what only the second has."""
    others = {layer.name: layer for layer in second.layers}
    pairs = [LayerPair(layer.name, layer, others.pop(layer.name, None)) for layer in first.layers]
    return pairs + [LayerPair(name, None, layer) for name, layer in others.items()]
