"""What a reconstruction is said to take: by block, in proportion to its length, and within the budgets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aquant_core.capture_model import capture
from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.forecast import BlockForecast, Forecast, forecast, together
from aquant_core.graph import CapturedModel
from aquant_core.methods import METHODS, Preset
from aquant_core.model import marked
from aquant_core.partition import partition
from aquant_core.reconstruction import Schedule
from aquant_core.resources import Resources, resident_bytes

LEARNED: list[Method] = ["adaround", "brecq", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"]
MIB = 1 << 20
AMPLE = Resources(memory_bytes=1 << 50)


class Net(nn.Module):
    """A stem, a residual block with a depthwise convolution, a mean and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.second = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


OUTPUTS = {"stem": 6 * 6 * 6, "first": 6 * 6 * 6, "mean": 6, "fc": 5}
"""Numbers in one image's output of each block, by the block's first node."""


def make_images(count: int) -> Tensor:
    """As many images as one likes: only the first ones, which are read, take memory."""
    return torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1)).expand(count, -1, -1, -1)


def make_graph() -> CapturedModel:
    torch.manual_seed(0)
    return fold_batch_norm(capture(Net().eval(), example=make_images(2)))


def run(
    graph: CapturedModel | None = None,
    images: int = 40,
    method: Method = "aquant",
    iterations: int = 20,
    resources: Resources = AMPLE,
    check: Callable[[], None] = lambda: None,
    others: int = 0,
    **changes: Any,
) -> Forecast:
    config = QuantizationConfig(**{"weight_bits": 2, "activation_bits": 2} | changes)
    graph = marked(graph or make_graph(), config, METHODS[method])
    schedule = Schedule(METHODS[method], Preset(iterations, 8, 3e-2, 1e-3, 3e-2), BorderConfig())
    return forecast(graph, partition(graph), make_images(images), config, schedule, resources, check, others)


@pytest.mark.parametrize("method", LEARNED)
def test_one_forecast_a_block_in_order(method: Method) -> None:
    graph = make_graph()
    blocks = run(graph, method=method).blocks
    expected = partition(graph)
    assert [block.name for block in blocks] == [block.name for block in expected]
    assert len(blocks) == len(OUTPUTS)
    assert any(not block.layers for block in expected)  # what only connects has its place, too
    assert all(block.seconds > 0 for block in blocks)
    assert all(block.peak_bytes > 0 for block in blocks)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by one second whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr("aquant_core.forecast.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.mark.usefixtures("ticking")
def test_seconds_grow_in_proportion_to_iterations_and_images() -> None:
    # On this clock an iteration takes one second, and a batch of up to 256 images three (one through the float block,
    # twice one through the quantized).
    for iterations, images in ((20, 40), (1000, 40), (20, 256), (20, 2560)):
        passing = 3 * images / min(images, 256)
        blocks = run(iterations=iterations, images=images).blocks
        learning = [iterations, iterations, 0, iterations]
        assert [block.seconds for block in blocks] == [pytest.approx(passing + more) for more in learning]


@pytest.mark.usefixtures("ticking")
def test_layer_by_layer_a_block_takes_as_often_as_it_has_layers() -> None:
    blocks = run(method="adaround").blocks
    assert [block.seconds for block in blocks] == [pytest.approx(3 + more) for more in (20, 40, 0, 20)]
    # Of a layer with float weights AdaRound learns nothing.
    blocks = run(method="adaround", layers={"first": {"weight_bits": 32}}).blocks
    assert [block.seconds for block in blocks] == [pytest.approx(3 + more) for more in (20, 20, 0, 20)]


def test_nothing_is_changed() -> None:
    graph = make_graph()
    before = {name: {k: t.clone() for k, t in kinds.items()} for name, kinds in graph.weights.items()}
    state = torch.get_rng_state()
    run(graph)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for name, kinds in graph.weights.items():
        for kind, tensor in kinds.items():
            assert torch.equal(tensor, before[name][kind])
            assert not tensor.requires_grad
            assert tensor.grad is None


def placements(forecasted: Forecast) -> list[str]:
    return [block.placement for block in forecasted.blocks]


def test_an_ample_budget_keeps_everything_in_memory() -> None:
    assert placements(run()) == ["memory"] * 4
    assert placements(run(resources=Resources())) == ["memory"] * 4  # a few images fit into any machine


def test_no_budget_puts_everything_on_disk() -> None:
    assert placements(run(resources=Resources(memory_bytes=0))) == ["disk"] * 4


def test_a_run_goes_to_disk_before_it_is_stopped_for_its_memory() -> None:
    limit = resident_bytes() + 64 * MIB
    assert placements(run(images=MANY, resources=Resources(limit_bytes=limit)))[:2] == ["disk", "disk"]
    assert placements(run(images=MANY, resources=Resources(memory_bytes=1 << 50, limit_bytes=limit))) == ["memory"] * 4


MANY = 1_000_000
"""Images whose caches are large against all that a trial measures."""


def test_a_budget_between_keeps_what_fits() -> None:
    large, small = 4 * MANY * OUTPUTS["stem"], 4 * MANY * (OUTPUTS["mean"] + OUTPUTS["fc"])
    assert large > 800 * MIB > 400 * MIB > 4 * small
    budget = resident_bytes() + 400 * MIB
    assert placements(run(images=MANY, resources=Resources(memory_bytes=budget))) == [
        "disk",
        "disk",
        "memory",
        "memory",
    ]
    # A block's target and its output: from twice the stem's on, it is kept.
    for spare, kept in ((-200 * MIB, "disk"), (400 * MIB, "memory")):
        budget = resident_bytes() + 2 * large + spare
        assert placements(run(images=MANY, resources=Resources(memory_bytes=budget)))[0] == kept


def test_the_peak_holds_what_is_kept_in_memory() -> None:
    pair = 4 * MANY * OUTPUTS["stem"]
    start = resident_bytes()
    stem, block, mean, fc = run(images=MANY).blocks
    # The first block's inputs are the images themselves; the second's are two outputs of the first.
    for expected, actual in ((2 * pair, stem), (3 * pair, block), (2 * pair, mean), (0, fc)):
        assert actual.peak_bytes - start == pytest.approx(expected, abs=300 * MIB)
    on_disk = run(images=MANY, resources=Resources(memory_bytes=0))
    assert on_disk.peak_bytes - start < 300 * MIB


def test_beside_other_methods_there_is_less_room() -> None:
    # Of the others each holds an input or an output of its own, and the clean input until all have learned.
    pair = 4 * MANY * OUTPUTS["stem"]
    start = resident_bytes()
    stem, block, mean, _ = run(images=MANY, others=1).blocks
    for expected, actual in ((3 * pair, stem), (5 * pair, block), (3 * pair, mean)):
        assert actual.peak_bytes - start == pytest.approx(expected, abs=300 * MIB)
    for others, needed in ((0, 2 * pair), (1, 3 * pair), (2, 4 * pair)):
        for spare, kept in ((-200 * MIB, "disk"), (400 * MIB, "memory")):
            resources = Resources(memory_bytes=resident_bytes() + needed + spare)
            assert placements(run(images=MANY, resources=resources, others=others))[0] == kept


def test_several_methods_together_take_the_sum_of_times_and_the_most_memory() -> None:
    first = Forecast((BlockForecast("stem", 1.0, 70, "disk"), BlockForecast("fc", 2.0, 10, "memory")))
    second = Forecast((BlockForecast("stem", 0.5, 60, "memory"), BlockForecast("fc", 4.0, 30, "memory")))
    both = together([first, second])
    assert both.blocks == (BlockForecast("stem", 1.5, 70, "disk"), BlockForecast("fc", 6.0, 30, "memory"))
    assert (both.seconds, both.peak_bytes) == (7.5, 70)
    assert together([first]) == first
    with pytest.raises(ValueError, match="shorter"):
        together([first, Forecast(second.blocks[:1])])


def test_check_is_called_for_every_block() -> None:
    calls: list[None] = []
    run(check=lambda: calls.append(None))
    assert len(calls) == 4


def test_checks_exception_ends_it() -> None:
    calls: list[None] = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        run(check=check)
    assert len(calls) == 2


def test_the_document_is_json_and_sums_up() -> None:
    result = run()
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert set(document) == {"seconds", "peak_bytes", "blocks"}
    assert [block["name"] for block in document["blocks"]] == [block.name for block in result.blocks]
    for told, block in zip(document["blocks"], result.blocks, strict=True):
        assert told == vars(block) | {"seconds": pytest.approx(block.seconds, abs=1e-3)}
    assert document["seconds"] == pytest.approx(sum(block.seconds for block in result.blocks), abs=0.1)
    assert document["peak_bytes"] == max(block.peak_bytes for block in result.blocks)


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize(
    ("method", "weights", "activations", "learning"),
    [
        ("aquant", 32, 32, [0, 0, 0, 0]),
        ("aquant", 2, 32, [0, 20, 0, 0]),
        ("aquant", 32, 2, [0, 20, 0, 0]),
        ("brecq", 2, 32, [0, 20, 0, 0]),
        ("brecq", 32, 2, [20, 20, 0, 0]),  # the stem's output is quantized in the stem's block
        ("adaround", 2, 32, [0, 40, 0, 0]),  # two layers
        ("adaround", 32, 2, [0, 0, 0, 0]),
    ],
)
def test_float_layers(method: Method, weights: int, activations: int, learning: list[int]) -> None:
    # The first and the last layer are float, whatever the rest is.
    result = run(method=method, weight_bits=weights, activation_bits=activations, first_last_bits=32)
    assert [block.seconds for block in result.blocks] == [pytest.approx(3 + more) for more in learning]
    assert placements(result) == ["memory"] * 4
