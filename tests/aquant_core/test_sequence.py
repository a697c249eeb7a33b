"""Several methods through the blocks together: what they share, in which order, and what is said of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aquant_core import sequence
from aquant_core.caches import BlockCache
from aquant_core.capture_model import capture
from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.forecast import BlockForecast, Forecast
from aquant_core.graph import INPUT
from aquant_core.methods import METHODS, Preset
from aquant_core.model import QuantizedModel, marked, quantize_to_nearest, run_float_block
from aquant_core.partition import Block, partition
from aquant_core.progress import Progress
from aquant_core.reconstruction import BlockHistory, Schedule, reconstruct_block
from aquant_core.resources import Resources
from aquant_core.sequence import Run, reconstruct_blocks

PRESET = Preset(6, 8, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
IMAGES = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
SECONDS = 6.0
"""Each block's forecast."""


class Net(nn.Module):
    """A stem, two convolutions with a shortcut around them, and a mean, which has nothing to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return torch.relu(x + self.second(torch.relu(self.first(x)))).mean((2, 3))


def make_runs(*methods: Method) -> list[Run]:
    torch.manual_seed(0)
    config = QuantizationConfig(weight_bits=4, activation_bits=4)
    graph = fold_batch_norm(capture(Net().eval(), example=IMAGES[:2]))
    runs = []
    for method in methods:
        settings = METHODS[method]
        own = marked(graph, config, settings)
        model, blocks = quantize_to_nearest(own, IMAGES, config, settings.placement), partition(own)
        expected = Forecast(tuple(BlockForecast(b.name, SECONDS if b.layers else 0.0, 0, "memory") for b in blocks))
        runs.append(Run(method, model, blocks, Schedule(settings, PRESET, BorderConfig()), expected))
    return runs


def go(runs: list[Run], tell: Callable[[Progress], None] = lambda _: None, seed: int = 0) -> None:
    reconstruct_blocks(runs, IMAGES, seed, Resources(), tell)


def history(run: Run) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if key not in ("seconds", "peak_bytes")} for entry in run.history
    ]


def test_together_each_learns_what_it_learns_alone() -> None:
    methods: list[Method] = ["aquant", "qdrop", "adaround"]
    together = make_runs(*methods)
    go(together)
    for run in together:
        (alone,) = make_runs(run.method)
        go([alone])
        assert history(run) == history(alone)
        states = run.model.state_dict(), alone.model.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert [entry["name"] for entry in run.history] == ["stem", "first"]


def test_the_float_network_is_run_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []

    def noted(graph: Any, block: Block, x: Tensor) -> Tensor:
        passed.append(block.name)
        return run_float_block(graph, block, x)

    monkeypatch.setattr(sequence, "run_float_block", noted)
    go(make_runs("aquant", "brecq", "qdrop_refactored"))
    assert passed == ["stem", "first", "mean"]
    passed.clear()
    go(make_runs("aquant", "adaround"))
    # Each layer of a block has a target of its own in AdaRound.
    assert passed == ["stem", "stem", "first", "first", "second", "mean"]


@dataclass
class Learned:
    """What a unit is learned from."""

    unit: str
    noised: Tensor
    clean: Tensor
    target: Tensor
    seed: int


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Learned]:
    found: list[Learned] = []

    def noted(
        model: QuantizedModel,
        unit: Block,
        cache: BlockCache,
        schedule: Schedule,
        generator: torch.Generator,
        told: Callable[[int, float], None],
    ) -> BlockHistory:
        values = (part.read(0, len(part)).clone() for part in (cache.noised, cache.clean, cache.target))
        found.append(Learned(unit.name, *values, generator.initial_seed()))
        return reconstruct_block(model, unit, cache, schedule, generator, told)

    monkeypatch.setattr(sequence, "reconstruct_block", noted)
    return found


@pytest.mark.parametrize("method", ["aquant", "adaround"])
def test_inputs_come_from_the_quantized_and_targets_from_the_float_network(
    method: Method, learned: list[Learned]
) -> None:
    (run,) = make_runs(method)
    go([run])
    graph, values = run.model.graph, {INPUT: IMAGES}
    for node in graph.nodes:
        values[node.name] = graph.run_node(node, [values[name] for name in node.inputs])
    with torch.no_grad():
        stem = run.model.run_block(run.blocks[0], IMAGES)  # as it was left
    # Block by block from its input to its output; in AdaRound to behind each layer's activation.
    ends = [("stem", "relu"), ("first", "relu_2")]
    if method == "adaround":
        ends = [("stem", "relu"), ("first", "relu_1"), ("second", "second")]
    assert [entry.unit for entry in learned] == [unit for unit, _ in ends]
    for entry, (unit, end) in zip(learned, ends, strict=True):
        torch.testing.assert_close(entry.target, values[end])
        assert torch.equal(entry.noised, IMAGES if unit == "stem" else stem)
        torch.testing.assert_close(entry.clean, IMAGES if unit == "stem" else values["relu"])
    assert not torch.equal(stem, values["relu"])


def test_methods_draw_the_same_images_block_by_block(learned: list[Learned]) -> None:
    methods: list[Method] = ["aquant_no_border", "qdrop_refactored", "brecq"]
    go(make_runs(*methods))
    go(make_runs("aquant"), seed=1)
    seeds = {unit: [entry.seed for entry in learned if entry.unit == unit] for unit in ("stem", "first")}
    for same in seeds.values():
        assert same[0] == same[1] == same[2] != same[3]
    assert seeds["stem"][0] != seeds["first"][0]


def test_the_seed_and_the_block_decide_what_is_drawn() -> None:
    # Not its place in the order, nor the methods before it: QDrop draws for every element, AQuant for the input alone.
    states = []
    for methods, seed in ((("qdrop", "aquant"), 0), (("aquant", "qdrop"), 0), (("qdrop", "aquant"), 1)):
        runs = make_runs(*methods)  # type: ignore[arg-type]
        go(runs, seed=seed)
        states.append({run.method: run.model.state_dict() for run in runs})
    for method in ("qdrop", "aquant"):
        first, second, other = (state[method] for state in states)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


@dataclass
class Clock:
    """Moves on only when told to."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sequence, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def told_with(clock: Clock, seconds: float) -> list[Progress]:
    """Two methods, two blocks; each of the two reports of a block is followed by half its time."""
    told: list[Progress] = []

    def tell(progress: Progress) -> None:
        told.append(progress)
        clock.now += seconds / 2

    go(make_runs("aquant", "brecq"), tell)
    assert [(p.method, p.block, p.iteration) for p in told] == [
        (method, block, step) for block in (1, 2) for method in ("aquant", "brecq") for step in (1, 6)
    ]
    return told


def test_seconds_left_count_all_methods_and_what_they_took(clock: Clock) -> None:
    # 24 s are forecast, for four blocks. Where s of them are done after t seconds, 24 - s are left, times
    # (t + 2.4) / (s + 2.4): the forecast itself counts as a tenth of all. At a block's first step of six s = t + 1,
    # at its last s = t + 3: 23 x 2.4 / 3.4, 18 x 5.4 / 8.4;  17 x 8.4 / 9.4, 12 x 11.4 / 14.4;  and so on.
    left = [progress.eta_seconds for progress in told_with(clock, SECONDS)]
    assert left == [16.2, 11.6, 15.2, 9.5, 10.3, 5.1, 4.8, 0.0]


def test_seconds_left_follow_a_slower_machine(clock: Clock) -> None:
    # Three times as slow: at the last block's first step 5 x (54 + 2.4) / 21.4.
    left = [progress.eta_seconds for progress in told_with(clock, 3 * SECONDS)]
    assert left[-2:] == [13.2, 0.0]


def test_what_a_block_took_is_its_own(clock: Clock) -> None:
    runs = make_runs("aquant", "brecq")

    def tell(progress: Progress) -> None:
        clock.now += 1.0 if progress.method == "aquant" else 10.0

    go(runs, tell)
    assert [[entry["seconds"] for entry in run.history] for run in runs] == [[2.0, 2.0], [20.0, 20.0]]
