"""The accuracy sweep: its statistics by hand, its cells kept, its plan complete, its page written from them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import aquant_core

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def accuracy() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("accuracy")


@pytest.fixture(scope="module")
def cells(accuracy: ModuleType) -> ModuleType:
    return sys.modules[accuracy.Cell.__module__]


@pytest.fixture(scope="module")
def page(accuracy: ModuleType) -> ModuleType:
    del accuracy  # it puts the folder on the path
    return importlib.import_module("results_page")


def made(cell: Any, right: np.ndarray, float_right: float = 0.9) -> dict[str, Any]:
    """A finished cell as ``measure`` keeps it, as far as the page reads it."""
    cells = sys.modules[type(cell).__module__]
    preset = cells.preset_of(cell)
    top1 = {"top1": float(right.mean()), "n": len(right)}
    return {
        "cell": {"seed": cell.seed, "network": cell.network, "method": cell.method},
        "accuracy": {"quantized": top1, "float": {"top1": float_right}},
        "correct": cells.packed(torch.from_numpy(right)),
        "preset": vars(preset),
        "settings": vars(cells.settings_of(cell.method, preset)),
        "border": cell.configuration.border.model_dump(),
        "seconds": 36.0,
        "threads": 1,
        "device": "a machine",
        "versions": {"torch": "2"},
    }


def test_right_images_survive_packing(cells: ModuleType) -> None:
    right = torch.tensor([True, False, True, True, False, False, True, False, True, True])  # more than a byte
    result = {"accuracy": {"quantized": {"n": 10}}, "correct": cells.packed(right)}
    assert cells.unpacked(result).tolist() == right.double().tolist()


def test_difference_by_hand(cells: ModuleType) -> None:
    # Two seeds, four images: means 1, 1/2, 1, 0 and 0, 1/2, 1, 0, so per image 1, 0, 0, 0.
    ours = [np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 1, 0])]
    theirs = [np.array([0.0, 1, 1, 0]), np.array([0.0, 0, 1, 0])]
    gain, half = cells.difference(ours, theirs)
    assert gain == 0.25
    assert half == pytest.approx(1.959964 * 0.5 / 2)  # the standard deviation of 1, 0, 0, 0 is 1/2
    assert cells.difference(ours, ours) == (0.0, 0.0)


def test_recovered_share_by_hand(cells: ModuleType) -> None:
    float_right, theirs = np.ones(1000), np.ones(1000)
    theirs[:100] = 0
    ours = theirs.copy()
    ours[:30] = 1  # 30 of the 100 that were lost
    share, low, high = cells.recovered(float_right, [ours], [theirs])
    assert share == pytest.approx(0.3)
    # Of 100 lost images a share with a standard error of sqrt(0.3 0.7 / 100) = 0.046 comes back.
    assert low == pytest.approx(0.3 - 1.96 * 0.046, abs=0.02)
    assert high == pytest.approx(0.3 + 1.96 * 0.046, abs=0.02)
    assert cells.recovered(float_right, [ours], [theirs]) == (share, low, high)
    almost = np.ones(1000)
    almost[:1] = 0  # in every third draw this image is not there
    assert cells.recovered(float_right, [float_right], [almost]) is None


def test_the_plan_is_the_papers_experiments(accuracy: ModuleType) -> None:
    cells = accuracy.plan()
    measured = {(cell.network, cell.bits, cell.method, cell.seed) for cell in cells if not cell.variant}
    for network in ("residual", "inverted_residual", "plain"):
        for bits in ("W2A2", "W3A3"):
            for method in ("adaround", "brecq", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"):
                assert {(network, bits, method, seed) for seed in (0, 1, 2)} <= measured
    for bits in ("W4A4", "W2A4"):
        assert {("residual", bits, method, 0) for method in accuracy.METHODS} <= measured
    for bits in ("W32A4", "W32A2"):
        of_bits = {method for _, width, method, _ in measured if width == bits}
        assert of_bits >= {"nearest", "a_rounding", "qdrop", "aquant"}
    table4 = {cell.variant for cell in cells if cell.section == "ablations"}
    assert {"linear border, no fusion", "linear border, fusion", "quadratic border, fusion"} <= table4
    for cell in cells:
        assert cell.configuration.method == cell.method


def test_a_cell_has_one_key_and_another_run_another(cells: ModuleType) -> None:
    one = cells.Cell("W2A2", "residual", "W2A2", "aquant", 1)
    assert one.key == cells.Cell("other table", "residual", "W2A2", "aquant", 1, "named so").key
    others = [
        cells.Cell("W2A2", "plain", "W2A2", "aquant", 1),
        cells.Cell("W2A2", "residual", "W2A4", "aquant", 1),
        cells.Cell("W2A2", "residual", "W2A2", "qdrop", 1),
        cells.Cell("W2A2", "residual", "W2A2", "aquant", 2),
        cells.Cell("W2A2", "residual", "W2A2", "aquant", 1, config={"iterations": 5}),
        cells.Cell("W2A2", "residual", "W2A2", "aquant", 1, preset="paper"),
        cells.Cell("W2A2", "residual", "W2A2", "aquant", 1, changes={"border_rate": 1.0}),
    ]
    assert len({one.key, *(other.key for other in others)}) == 8


def test_what_is_finished_is_kept_and_not_measured_again(
    cells: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def images(network: str) -> Any:
        evaluation = Evaluation(EXAMPLES / "evaluation.npz", 64)
        return cells.Images(str(EXAMPLES / f"{network}.onnx"), EXAMPLES / "calibration.npz", evaluation)

    one = cells.Cell("test", "plain", "W4A4", "nearest")
    two = cells.Cell("test", "plain", "W4A4", "aquant", config={"iterations": 1})
    path = tmp_path / "results.json"
    results = cells.Results(path)
    results.add(one, made(one, np.ones(10) > 0))
    # In this process: a pool's children would not find this test's module.
    results.add(two, cells.measure(two, images("plain"), threads=1))
    kept = json.loads(path.read_text())["cells"]
    assert list(kept) == [one.key, two.key]
    found = kept[two.key]
    assert found["accuracy"]["quantized"]["n"] == 64
    assert cells.unpacked(found).mean() == pytest.approx(found["accuracy"]["quantized"]["top1"], abs=1e-6)
    assert found["preset"]["iterations"] == 1
    assert found["versions"]["torch"] == torch.__version__
    cells.sweep([one, two], cells.Results(path), images, processes=1, threads=1, device="cpu")
    assert "0 cells to be measured, 2 are there" in capsys.readouterr().out


class Evaluation:
    """The first labelled images of a file."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count

    def __call__(self) -> aquant_core.ImageSet:
        images = aquant_core.read_images(self.path, what="evaluation")
        assert images.labels is not None
        return aquant_core.ImageSet(images.images[: self.count], images.labels[: self.count])


def test_changes_of_a_cell_reach_the_run(accuracy: ModuleType, cells: ModuleType) -> None:
    variant = "block input dropped"
    (cell,) = [c for c in accuracy.plan() if (c.section, c.variant, c.seed) == ("ablations", variant, 0)]
    evaluation = Evaluation(EXAMPLES / "evaluation.npz", 32)
    images = cells.Images(str(EXAMPLES / "plain.onnx"), EXAMPLES / "calibration.npz", evaluation)
    short = cells.Cell(**{**vars(cell), "network": "plain", "config": {"iterations": 1}})
    found = cells.measure(short, images, threads=1)
    assert found["settings"]["drop_input"] == 0.5
    assert found["settings"]["regulariser_weight"] == 0.01  # the preset's own change stays


def test_the_page_says_what_the_cells_say(page: ModuleType, accuracy: ModuleType, cells: ModuleType) -> None:
    """Of 1,000 images the float network has 900 right, QDrop 800, AQuant 850: half of what is lost."""
    plan, results = accuracy.plan(), cells.Results(Path("nowhere.json"))

    def right(count: int) -> np.ndarray:
        return np.arange(1000) < count

    counts = {"nearest": 500, "adaround": 700, "brecq": 790, "qdrop": 800, "aquant": 850}
    for cell in plan:
        if (cell.section, cell.network) == ("float", "residual"):
            results.cells[cell.key] = made(cell, right(900))
        if (cell.section, cell.network) == ("W2A2", "residual") and not cell.variant and cell.method in counts:
            results.cells[cell.key] = made(cell, right(counts[cell.method] + cell.seed))
    text = page.page(plan, results)
    assert "| AdaRound | 70.10 ± 0.10 | - | - |" in text
    assert "| **AQuant** | 85.10 ± 0.10 | - | - |" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| residual | QDrop |"))
    assert row.startswith("| residual | QDrop | +5.00 ± 1.3")  # 1.96 sqrt(0.05 0.95 / 1000)
    assert "| +5.00, +5.00, +5.00 | **51 %** (" in row  # 50 of 99 that are lost on the seeds' average
    row = next(line for line in text.splitlines() if line.startswith("| W2A2 | residual | yes"))
    assert row.count("yes") == 6
    assert "| W3A3 | plain (digits) | 19 |" in text.split("## Not measured yet")[1]


def test_a_cell_of_other_defaults_is_measured_again(cells: ModuleType, tmp_path: Path) -> None:
    cell = cells.Cell("W2A2", "residual", "W2A2", "aquant", 1)
    results = cells.Results(tmp_path / "results.json")
    assert cell not in results
    for key, value in (
        ("settings", {"drop_input": 0.9}),
        ("preset", {"border_rate": 1.0}),
        ("border", {"form": "linear"}),
    ):
        finished = made(cell, np.ones(10) > 0)
        results.add(cell, finished)
        assert cell in results
        results.add(cell, finished | {key: finished[key] | value})
        assert cell not in results
    assert results.of([cell]) == []


def test_a_cell_of_before_a_switch_is_one_of_its_default(cells: ModuleType, tmp_path: Path) -> None:
    results = cells.Results(tmp_path / "results.json")
    cell = cells.Cell("W2A2", "plain", "W2A2", "aquant")
    finished = made(cell, np.ones(4) > 0)
    del finished["border"]["bits"]
    results.cells[cell.key] = finished
    assert cell in results
    finished["border"]["bits"] = 8
    assert cell not in results


def test_the_committed_page_is_the_committed_cells(page: ModuleType, accuracy: ModuleType, cells: ModuleType) -> None:
    results = cells.Results(ROOT / "benchmarks" / "results" / "accuracy.json")
    assert (ROOT / "docs" / "results.md").read_text() == page.page(accuracy.plan(), results)
