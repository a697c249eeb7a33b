"""What a checkpoint weighs and what 8-bit borders cost: every byte counted, tables by hand, the page from the JSON."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from aquant_core import capture
from aquant_core.fold import fold_batch_norm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module", autouse=True)
def folder_on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_sizes_by_hand(tmp_path: Path) -> None:
    first, second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 6, 3, bias=False)
    net = nn.Sequential(first, nn.BatchNorm2d(8), second, nn.Flatten(), nn.Linear(24, 5))
    captured = capture(net.eval(), example=torch.rand(1, 3, 6, 6))
    # Weights 216, 432 and 120 at 8, 2 and 8 bits; positions 27, 72 and 24; outputs 8, 6 and 5, two of them with a bias.
    assert captured.float_bytes() == 4 * (216 + 4 * 8 + 432 + 120 + 5)
    codes, positions = 216 + 108 + 120, 27 + 72 + 24
    for bits, of_parameter in ((16, 2), (8, 1)):
        found = script("checkpoint_size").measure(fold_batch_norm(captured), bits, tmp_path)
        parts = found["parts"]
        assert parts.pop("header") == found["bytes"] - sum(parts.values())
        assert parts == {
            "codes": codes, "borders": 3 * positions * of_parameter, "steps and zero-points": 5 * 19 + 4 * 3,
            "biases": 4 * 13,
        }  # fmt: skip
        assert found["ideal"] == codes
        assert found["layers"] == 3


def test_the_page_has_the_committed_sizes() -> None:
    networks = json.loads((RESULTS / "checkpoint_size.json").read_text())["networks"]
    page = (ROOT / "docs" / "performance.md").read_text()
    assert list(networks) == script("checkpoint_size").ARCHITECTURES
    for row in networks.values():
        wide, narrow = row["16-bit borders"], row["8-bit borders"]
        assert f"| {row['float32']:,} | {wide['ideal']:,} | {wide['bytes']:,} |" in page
        assert f"| **1/{row['float32'] / wide['bytes']:.2f}** | {wide['bytes'] / wide['ideal']:.2f} |" in page
        assert f"| {narrow['bytes']:,}: 1/{row['float32'] / narrow['bytes']:.2f} |" in page
        for found in (wide, narrow):
            assert found["parts"]["header"] <= 1024 * (8 + found["layers"])
    resnet = networks["resnet18"]
    assert 13 * resnet["16-bit borders"]["bytes"] <= resnet["float32"]


def test_the_page_has_the_committed_loss_of_8_bit_borders() -> None:
    border_bits, cells = script("border_bits"), script("cells")
    table = border_bits.table(cells.Results(RESULTS / "border_bits.json"), list(border_bits.SEEDS))
    assert len(table.splitlines()) > 2
    assert table in (ROOT / "docs" / "checkpoint.md").read_text()


def test_the_table_of_widths_by_hand(tmp_path: Path) -> None:
    border_bits, cells = script("border_bits"), script("cells")
    results = cells.Results(tmp_path / "results.json")
    right = {16: [1, 1, 1, 0], 8: [1, 1, 0, 0]}
    for seed in (0, 1):
        for bits in (16, 8) if seed == 0 else (16,):  # seed 1 is not finished
            cell = border_bits.cell_of("plain", bits, seed)
            assert cell.configuration.border.bits == bits
            preset, config = cells.preset_of(cell), cell.configuration
            results.cells[cell.key] = {
                "accuracy": {"quantized": {"n": 4}},
                "correct": cells.packed(torch.tensor(right[bits]).bool()),
                "size": {"border_bytes": 100 * bits},
                "preset": vars(preset),
                "settings": vars(cells.settings_of(config.method, preset)),
                "border": config.border.model_dump(),
            }
    half = 1.959964 * np.std([0, 0, 1, 0], ddof=1) / 2
    assert border_bits.table(results, [0, 1]).splitlines()[2:] == [
        f"| plain | 1 | 75.00 | 50.00 | -25.00 ± {100 * half:.2f} | 1,600 -> 800 |"
    ]
    assert len(border_bits.plan([0, 1])) == 12
