"""The paper's experiments on the three example networks, cell by cell; what is in the results is not run again.

    python benchmarks/accuracy.py --sections W2A2 W3A3 --processes 2

Each network is measured on all 10,000 test images of its data set: Fashion-MNIST (``--fashion``: the folder of Debian's
``dataset-fashion-mnist``) or MNIST (``--digits``, see ``examples/digits/README.md``). Cells are kept in
``benchmarks/results/accuracy.json``; ``docs/results.md`` is written from them, also with ``--page`` alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from cells import Cell, Images, Results, sweep
from record import RESULTS
from results_page import SEEDS, page

import aquant_core
from aquant_core.config import Method

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples" / "fashion_mnist"))
METHODS = ["nearest", "adaround", "brecq", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"]
NETWORKS = {"residual": "fashion_mnist", "inverted_residual": "fashion_mnist", "plain": "digits"}


@dataclass(frozen=True)
class TestImages:
    """All test images of a data set; read in the process that needs them."""

    folder: Path

    def __call__(self) -> aquant_core.ImageSet:
        from train import read_split

        images, labels = read_split(self.folder, "test")
        return aquant_core.ImageSet(torch.tensor(images).float() / 255, torch.tensor(labels).long())


def by_method(section: str, bits: str, network: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    """A column of Table 3: every method; those that draw nothing run once."""
    for method in METHODS:
        for seed in seeds if method != "nearest" else (0,):
            yield Cell(section, network, bits, method, seed)


def shortcuts(network: str, bits: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    """AQuant with its shortcuts quantized, as the methods that quantize outputs have them."""
    if network != "plain":  # it has none
        for seed in seeds:
            config = {"protocol_switches": {"shortcut": "low"}}
            yield Cell(bits, network, bits, "aquant", seed, "aquant, shortcut quantized", config)


ABLATIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear border, no fusion", {"border": {"form": "linear", "fusion": "none"}}, {}),
    ("quadratic border, fusion", {"border": {"fusion": "channel_mean"}}, {}),
    ("linear border, fusion", {"border": {"form": "linear", "fusion": "channel_mean"}}, {}),
    ("fusion, learned alpha", {"border": {"fusion": "channel_mean", "alpha": "learned"}}, {}),
    ("bound: stretched", {"border": {"bound": "stretched"}}, {}),
    ("bound: clip", {"border": {"bound": "clip"}}, {}),
    ("one border a channel", {"border": {"granularity": "channel"}}, {}),
    ("no gradient through the border's input", {"border": {"input_gradient": False}}, {}),
    ("no rounding schedule", {}, {"settings": {"rounding_schedule": False}}),
    ("block input dropped", {}, {"settings": {"drop_input": 0.5}}),
    ("input and inside dropped", {}, {"settings": {"drop_input": 0.5, "drop_inside": 0.5}}),
    ("lambda 0.05, beta from 16", {}, {"settings": {"regulariser_weight": 0.05, "first_beta": 16.0}}),
    ("border's rate constant", {}, {"border_decays": False}),
    ("border's rate 1e-3, the paper's", {}, {"border_rate": 1e-3, "border_decays": False}),
    ("border's rate 1e-2", {}, {"border_rate": 1e-2}),
    ("border's rate 4e-2", {}, {"border_rate": 4e-2}),
    (
        "the paper's fusion, dropping, regulariser and border's rate",
        {"border": {"fusion": "channel_mean"}},
        {
            "border_rate": 1e-3,
            "border_decays": False,
            "settings": {"drop_input": 0.5, "regulariser_weight": 0.05, "first_beta": 16.0},
        },
    ),
]


def ablations(seeds: tuple[int, ...]) -> Iterator[Cell]:
    """Table 4, and this project's own switches."""
    for seed in seeds:
        for variant, config, changes in ABLATIONS:
            yield Cell("ablations", "residual", "W2A2", "aquant", seed, variant, config, "fast", changes)


def dropping(network: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    """The paper's dropping of the block's input, which `fast` does without, with a border and without."""
    for seed in seeds:
        for method in ("aquant", "aquant_no_border"):
            changes = {"settings": {"drop_input": 0.5}}
            yield Cell("dropping", network, "W2A2", method, seed, f"{method}, dropping", changes=changes)


INVERTED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear border", {"border": {"form": "linear"}}, {}),
    ("border's rate 5e-3", {}, {"border_rate": 5e-3}),
    ("input and inside dropped", {}, {"settings": {"drop_input": 0.5, "drop_inside": 0.5}}),
    ("a quarter of input and inside dropped", {}, {"settings": {"drop_input": 0.25, "drop_inside": 0.25}}),
    ("1000 iterations", {"iterations": 1000}, {}),
]


def tried(bits: str) -> Iterator[Cell]:
    """What might help where the border gains least."""
    for variant, config, changes in INVERTED:
        yield Cell("tried", "inverted_residual", bits, "aquant", 0, variant, config, "fast", changes)


def activations_only(bits: str) -> Iterator[Cell]:
    """Tables 1 and 2: weights float."""
    for method in ("nearest", "a_rounding", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"):
        yield Cell(bits, "residual", bits, method)


def longer(network: str) -> Iterator[Cell]:
    """More iterations, and the paper's own preset."""
    for iterations in (1000, 3000):
        for method in ("qdrop_refactored", "aquant_no_border", "aquant"):
            yield Cell(f"{iterations} iterations", network, "W2A2", method, config={"iterations": iterations})
    for method in ("qdrop", "aquant_no_border", "aquant"):
        yield Cell("preset paper", network, "W2A2", method, preset="paper")


def plan() -> list[Cell]:
    """All cells, the most wanted first."""
    cells = [Cell("float", network, "W32A32", "nearest") for network in NETWORKS]
    for bits in ("W2A2", "W3A3"):
        for network in NETWORKS:
            cells += by_method(bits, bits, network, SEEDS)
            cells += shortcuts(network, bits, SEEDS)
    for bits in ("W4A4", "W2A4"):
        cells += by_method(bits, bits, "residual", (0,))
    cells += [Cell("W2A2", "residual", "W2A2", "a_rounding")]
    for bits in ("W32A2", "W32A4"):
        cells += activations_only(bits)
    for bits in ("W2A2", "W3A3"):
        cells += tried(bits)
    for network in NETWORKS:
        cells += dropping(network, SEEDS)
    cells += ablations((0,))
    cells += ablations((1, 2))
    for network in NETWORKS:
        cells += longer(network)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = list(dict.fromkeys(cell.section for cell in plan()))
    parser.add_argument("--sections", nargs="+", default=sections, choices=sections)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=get_args(Method), choices=get_args(Method))
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), metavar="FOLDER")
    parser.add_argument("--digits", type=Path, default=ROOT / "examples" / "digits" / "data", metavar="FOLDER")
    parser.add_argument("--processes", type=int, default=1, help="cells measured at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--page", action="store_true", help="write docs/results.md from what is there, measure nothing")
    options = parser.parse_args()
    results = Results(RESULTS / "accuracy.json")
    folders = {"fashion_mnist": options.fashion, "digits": options.digits}

    def images(network: str) -> Images:
        example = NETWORKS[network]
        here = ROOT / "examples" / example
        model, calibration = str(here / f"{network}.onnx"), here / "calibration.npz"
        return Images(model, calibration, TestImages(folders[example]))

    if not options.page:
        for name, folder in folders.items():
            if name in {NETWORKS[network] for network in options.networks} and not folder.is_dir():
                raise SystemExit(f"{folder} is not there: see examples/{name}/README.md for the data set's files")
        chosen = [
            cell
            for cell in plan()
            if cell.section in options.sections
            and cell.network in options.networks
            and cell.seed in options.seeds
            and cell.method in options.methods
        ]
        sweep(chosen, results, images, options.processes, options.threads, options.device)
    (ROOT / "docs" / "results.md").write_text(page(plan(), results))


if __name__ == "__main__":
    main()
