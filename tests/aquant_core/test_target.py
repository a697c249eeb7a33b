"""The search for a target on a small trained network: what is found, what when nothing holds, cut off and resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aquant_core.config import QuantizationConfig
from aquant_core.errors import ResumeError
from aquant_core.images import ImageSet
from aquant_core.methods import PRESETS
from aquant_core.pipeline import QuantizationResult, quantize
from aquant_core.progress import Progress
from aquant_core.target import first_that_holds

PRESET = replace(PRESETS["smoke"], iterations=6)
BLOCKS = 4
DROPS = [0.0, 3.0, 10.0, 100.0]


class Net(nn.Module):
    """Three convolutions of different need, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.last = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.last(torch.relu(self.middle(torch.relu(self.stem(x))))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def make_images(count: int, seed: int) -> ImageSet:
    """Six classes: noise with a stripe of one of three directions, thin or thick."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (count,), generator=generator)
    images = 0.7 * torch.randn(count, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        stripes = torch.zeros(8, 8)
        stripes[2 : 3 + 3 * (label // 3)] = 1.5
        images[index, 0] += [stripes, stripes.T, torch.diag(torch.full((8,), 3.0))][label % 3]
    return ImageSet(images, labels)


CALIBRATION, EVALUATION = make_images(64, 1), make_images(300, 2)


@cache
def trained() -> Net:
    training = make_images(512, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(training.images), training.labels).backward()
        optimizer.step()
    return net.eval()


def run(
    drop: float,
    folder: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    evaluation: ImageSet = EVALUATION,
    **changes: Any,
) -> QuantizationResult:
    config = {"target": {"max_accuracy_drop": drop}, "protocol": "all-low-bit", "sensitivity": False} | changes
    checked = QuantizationConfig.model_validate(config)
    return quantize(trained(), CALIBRATION, checked, evaluation, on_progress, PRESET, resume_from=folder)


@given(st.lists(st.booleans(), max_size=31))
def test_the_first_that_holds(row: list[bool]) -> None:
    asked: list[int] = []

    def holds(index: int) -> bool:
        asked.append(index)
        return row[index]

    first = first_that_holds(len(row), holds)
    assert len(set(asked)) == len(asked) <= len(row).bit_length()
    assert first == len(row) or (row[first] and first in asked)
    assert first == 0 or (not row[first - 1] and first - 1 in asked)


@given(st.integers(0, 31).flatmap(lambda count: st.tuples(st.just(count), st.integers(0, count))))
def test_the_first_that_holds_in_order(case: tuple[int, int]) -> None:
    count, first = case
    assert first_that_holds(count, lambda index: index >= first) == first


@given(st.lists(st.floats(0, 5), min_size=1, max_size=31), st.floats(0, 5), st.floats(0, 5))
def test_a_larger_drop_never_leads_further_whatever_the_candidates_do(
    drops: list[float], one: float, other: float
) -> None:
    small, large = sorted((one, other))
    found = [first_that_holds(len(drops), lambda index, most=most: drops[index] <= most) for most in (small, large)]
    assert found[1] <= found[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for searches that differ in nothing but the target: they take each other's blocks."""
    return tmp_path_factory.mktemp("blocks")


@pytest.fixture(scope="module")
def by_drop(shared: Path) -> dict[float, dict[str, Any]]:
    return {drop: run(drop, shared).report for drop in DROPS}


def test_the_network_is_worth_searching(by_drop: dict[float, dict[str, Any]]) -> None:
    assert by_drop[0.0]["accuracy"]["float"]["top1"] > 0.75
    assert len({report["size"]["quantized_bytes"] for report in by_drop.values()}) >= 3


@pytest.mark.parametrize("drop", DROPS)
def test_the_report_is_that_of_the_network_chosen(drop: float, by_drop: dict[float, dict[str, Any]]) -> None:
    report = by_drop[drop]
    target, accuracy = report["target"], report["accuracy"]
    chosen = target["candidates"][target["chosen"]]
    assert target["metric"] == "top1"
    assert target["max_accuracy_drop"] == drop
    assert chosen["accuracy"] == accuracy["quantized"]["top1"]
    assert chosen["bytes"] == report["size"]["quantized_bytes"]
    assert chosen["layers"] == {
        layer["name"]: [layer["weight_bits"], layer["activation_bits"]] for layer in report["layers"]
    }
    lost = 100 * (accuracy["float"]["top1"] - accuracy["quantized"]["top1"])
    assert target["drop"] == chosen["drop"] == pytest.approx(lost, abs=1e-3)
    assert target["interval"] == chosen["interval"]
    assert target["interval"][0] <= target["drop"] <= target["interval"][1]
    assert report["config"]["target"] == {"max_accuracy_drop": drop}


@pytest.mark.parametrize("drop", DROPS)
def test_held_means_held_and_no_smaller_one_that_was_tried_holds(
    drop: float, by_drop: dict[float, dict[str, Any]]
) -> None:
    target = by_drop[drop]["target"]
    chosen = target["candidates"][target["chosen"]]
    assert len(target["candidates"]) <= 5
    for candidate in target["candidates"]:
        assert candidate["held"] == (candidate["drop"] <= drop)
        assert not (candidate["held"] and candidate["bytes"] < chosen["bytes"])
    assert target["held"] == any(candidate["held"] for candidate in target["candidates"])
    assert chosen["held"] == target["held"]


def test_a_larger_drop_allowed_never_gives_a_larger_network(by_drop: dict[float, dict[str, Any]]) -> None:
    sizes = [by_drop[drop]["size"]["quantized_bytes"] for drop in DROPS]
    assert sizes == sorted(sizes, reverse=True)


def test_when_any_drop_will_do_the_network_has_the_lowest_widths(by_drop: dict[float, dict[str, Any]]) -> None:
    report = by_drop[100.0]
    plain = quantize(
        trained(),
        CALIBRATION,
        QuantizationConfig(weight_bits=2, activation_bits=2, protocol="all-low-bit", sensitivity=False),
        EVALUATION,
        preset=PRESET,
    ).report
    assert plain["digests"] == report["digests"]
    assert plain["size"] == report["size"]
    assert plain["target"] is None


def test_a_candidate_is_what_a_run_at_its_widths_gives(by_drop: dict[float, dict[str, Any]]) -> None:
    report = by_drop[3.0]
    layers = {
        layer["name"]: {"weight_bits": layer["weight_bits"], "activation_bits": layer["activation_bits"]}
        for layer in report["layers"]
    }
    config = {"weight_bits": 2, "activation_bits": 2, "protocol": "all-low-bit", "layers": layers}
    plain = quantize(trained(), CALIBRATION, config, EVALUATION, preset=PRESET).report
    assert plain["digests"] == report["digests"]


def impossible() -> ImageSet:
    """Labels that the float network has all right, and no other does."""
    with torch.no_grad():
        return ImageSet(EVALUATION.images, trained()(EVALUATION.images).argmax(1))


def test_the_best_is_saved_when_none_holds() -> None:
    # All layers but one are kept at 2 bits by naming them, so that eight bits for that one do not bring back enough.
    kept = {name: {"weight_bits": 2, "activation_bits": 2} for name in ("stem", "middle", "fc")}
    report = run(0.0, evaluation=impossible(), layers=kept).report
    target = report["target"]
    assert not target["held"]
    drops = [candidate["drop"] for candidate in target["candidates"]]
    assert target["drop"] == min(drops) > 0
    assert report["size"]["quantized_bytes"] == target["candidates"][drops.index(min(drops))]["bytes"]
    assert all(candidate["layers"]["stem"] == [2, 2] for candidate in target["candidates"])
    assert {tuple(candidate["layers"]["last"]) for candidate in target["candidates"]} > {(8, 8)}
    assert any("No network that was tried holds a drop of 0 points" in warning for warning in report["warnings"])


def test_without_labels_the_float_networks_decisions_are_to_be_kept() -> None:
    report = run(5.0, evaluation=ImageSet(EVALUATION.images)).report
    target = report["target"]
    assert target["metric"] == "agreement"
    assert target["drop"] == pytest.approx(100 * (1 - report["fidelity"]["quantized"]["agreement"]), abs=1e-3)
    assert any("No labels" in warning for warning in report["warnings"])


def test_no_layer_falls_below_the_widths_given() -> None:
    report = run(100.0, weight_bits=3, activation_bits=5).report
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in report["layers"]} == {(3, 5)}


@pytest.mark.parametrize("method", ["nearest", "qdrop"])
def test_other_methods_are_searched_too(method: str) -> None:
    report = run(5.0, method=method).report
    chosen = report["target"]["candidates"][report["target"]["chosen"]]
    assert chosen["accuracy"] == report["accuracy"]["quantized"]["top1"]
    assert chosen["layers"] == {
        layer["name"]: [layer["weight_bits"], layer["activation_bits"]] for layer in report["layers"]
    }
    # What it is compared with is rounded to nearest at the same widths.
    layers = {name: {"weight_bits": w, "activation_bits": a} for name, (w, a) in chosen["layers"].items()}
    config = {"method": "nearest", "weight_bits": 2, "activation_bits": 2, "layers": layers, "sensitivity": False}
    nearest = quantize(trained(), CALIBRATION, config | {"protocol": "all-low-bit"}, EVALUATION).report
    assert report["fidelity"]["nearest"] == nearest["fidelity"]["quantized"]


def saved(result: QuantizationResult, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


class StoppedError(Exception):
    """Raised by a test's callback."""


@pytest.mark.parametrize("block", [2, 2 * BLOCKS + 2, 0])
def test_a_search_that_was_cut_off_ends_with_the_same_bytes(block: int, tmp_path: Path) -> None:
    """In the first candidate, in the third, and when all have been learned."""
    whole: list[Progress] = []
    expected = saved(run(3.0, on_progress=whole.append), tmp_path / "whole.safetensors")

    def stop(progress: Progress) -> None:
        if (block and progress.block >= block) or progress.stage == "evaluate":
            raise StoppedError

    with pytest.raises(StoppedError):
        run(3.0, tmp_path / "blocks", stop)
    again: list[Progress] = []
    result = run(3.0, tmp_path / "blocks", again.append)
    assert saved(result, tmp_path / "again.safetensors") == expected
    learned = [{(p.block, p.iteration) for p in told if p.stage == "reconstruct"} for told in (whole, again)]
    assert learned[1] < learned[0]
    assert (learned[1] == set()) == (block == 0)


def test_a_block_behind_equal_widths_is_learned_once(tmp_path: Path) -> None:
    report = run(3.0, tmp_path).report
    prefixes = {
        tuple(map(tuple, list(candidate["layers"].values())[:length]))
        for candidate in report["target"]["candidates"]
        for length in range(1, BLOCKS + 1)
    }
    assert len(list(tmp_path.glob("*.safetensors"))) == len(prefixes)


def test_another_runs_folder_is_refused(shared: Path, by_drop: dict[float, dict[str, Any]]) -> None:
    assert by_drop
    with pytest.raises(ResumeError):
        run(3.0, shared, seed=1)


def test_progress_is_that_of_the_whole_search() -> None:
    told: list[Progress] = []
    report = run(3.0, on_progress=told.append).report
    stages = list(dict.fromkeys(progress.stage for progress in told))
    assert stages == ["capture", "forecast", "search", "nearest", "reconstruct", "evaluate"]
    steps = [progress for progress in told if progress.stage == "reconstruct"]
    positions = [(progress.block, progress.iteration) for progress in steps]
    assert positions == sorted(set(positions))
    (blocks,) = {progress.blocks for progress in steps}
    assert steps[-1].block <= blocks
    assert blocks in {rounds * BLOCKS for rounds in range(len(report["target"]["candidates"]), 6)}
    assert all(progress.eta_seconds is not None and progress.eta_seconds >= 0 for progress in steps)
    tries = [(progress.iteration, progress.iterations) for progress in told if progress.stage == "search"]
    assert tries[-1] == (5 * BLOCKS, 5 * BLOCKS)  # four layers, five widths
    (forecast,) = (progress.forecast for progress in told if progress.forecast is not None)
    assert forecast == report["forecast"]
    assert [block["name"] for block in forecast["blocks"]].count("stem") == blocks // BLOCKS
