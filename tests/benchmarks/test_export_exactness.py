"""The exactness of the export: the page shows the committed results, its sums by hand, its plan complete."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from aquant_core.config import Method

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exactness() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("export_exactness")


@pytest.fixture(scope="module")
def cells() -> dict[str, dict[str, Any]]:
    committed = json.loads((ROOT / "benchmarks" / "results" / "export_exactness.json").read_text())
    found: dict[str, dict[str, Any]] = committed["cells"]
    return found


def test_the_page_has_the_committed_table(exactness: ModuleType, cells: dict[str, dict[str, Any]]) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert exactness.page(cells) in page


def test_no_committed_code_differs_given_its_input(cells: dict[str, dict[str, Any]]) -> None:
    assert sum(row["codes"] for row in cells.values()) > 1e8
    assert {row["differing_given_input"] for row in cells.values()} == {0}


def test_the_plan_has_every_method_and_architecture(exactness: ModuleType, cells: dict[str, dict[str, Any]]) -> None:
    planned = [key for key, _ in exactness.plan()]
    assert len(planned) == len(set(planned)) == 6 * 5 + 3 * 4 * 11
    assert {key.split(" | ")[2] for key in planned} >= set(get_args(Method))
    assert set(cells) <= set(planned)


def test_the_table_by_hand(exactness: ModuleType) -> None:
    row = {"values": 2, "images": 4, "codes": 500, "differing_given_input": 0, "differing_in_run": 1}
    row |= {"images_with_all_codes": 3, "logits_difference": 1e-6, "logits_scale": 2.0, "same_top1": 9, "predicted": 10}
    other = row | {"differing_in_run": 0, "images_with_all_codes": 0, "logits_difference": 0.0, "same_top1": 10}
    lines = exactness.page({"net | W2A2 | nearest": row, "net | W4A4 | nearest": other, "net | W2A2 | x": other})
    assert lines.splitlines()[2:] == [
        "| net | W2A2, W4A4 | nearest | 1e+03 | 0 | 1.0e-03 | 5.0e-07 | 19 of 20 |",
        "| net | W2A2 | x | 500 | 0 | 0.0e+00 | - | 10 of 10 |",
    ]
