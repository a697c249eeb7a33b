"""The paper's Tables 1 to 4 on ImageNet, cell by cell; what is in the results is not measured again.

    python benchmarks/imagenet.py --imagenet /data/imagenet --weights /data/weights --device cuda --page tables.md
    python benchmarks/imagenet.py ... --sections table3 --networks resnet18 --bits W2A2

It claims no number: it measures them for whoever has ImageNet, and prints the tables with the paper's numbers beside
the measured ones. Finished cells are kept in ``benchmarks/results/imagenet.json``.

``--imagenet``: a folder with ``train`` and ``val`` as ``torchvision.datasets.ImageFolder`` reads them, a folder for
each class. ``--cache`` takes what is made of them once: 1,024 training images, drawn and cropped by the seed, 0.6 GB,
and the validation images, cropped, as bytes, 7.5 GB for all 50,000 (see ``imagenet_images``).

``--weights``: a folder with a state dict for each network, ``resnet18.safetensors`` or ``resnet18.pth``, the names of
its tensors being torchvision's (``aquant_core.architectures``; RegNetX-600MF and MNASNet x2.0 are named likewise).
Nothing is downloaded. The paper builds on QDrop's code, which uses the weights that BRECQ publishes
(https://github.com/yhhhli/BRECQ/releases/tag/v1.0); torchvision's have other float accuracies, and then no number is
comparable but the losses against one's own baseline. By their sources BRECQ's ResNets and MNASNet have torchvision's
names, its RegNets and its MobileNetV2 (the entry ``model`` of its file) others in the same order, so that they are
renamed by::

    names, tensors = build("regnet_x_600mf").state_dict(), torch.load("regnet_600m.pth.tar", weights_only=True)
    kept = [[key for key in part if "num_batches" not in key] for part in (names, tensors)]
    save_file({name: tensors[key] for name, key in zip(*kept, strict=True)}, "regnet_x_600mf.safetensors")

What is set network by network:

- MobileNetV2 and MNASNet have the linear border (section 5, "Experimental setup").
- On these two QDrop's code weighs its regulariser by lambda = 0.1 and 0.2; the rows AdaRound, BRECQ and QDrop, which
  are one engine here, have that, too, where weights are quantized.
- AQuant keeps lambda = 0.05 and beta from 16 on all six. Appendix C gives them for AQuant without naming a network,
  against the 0.01 and 20 of "previous works"; of QDrop's exceptions it says nothing. On these two 0.05 is less than
  QDrop's own, though appendix C means to strengthen the regulariser.

What the paper's rows of other methods had otherwise: it ran their own codes, each with its own protocol (``docs/
method.md``) and the weights' rounding learned at 1e-3. Here all rows have protocol ``paper`` and the preset's rate.
AdaRound at W2A2 is not in the paper.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from cells import Cell, Images, Results, packed, sweep
from imagenet_images import InputError, Validation, draw_calibration, problems, sha256
from record import RESULTS, command, commit
from torch import Tensor

from aquant_core.config import Method, PresetName
from aquant_core.evaluation import accuracy, logits_of
from aquant_core.methods import METHODS

NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "regnet_x_600mf": "RegNetX-600MF",
    "regnet_x_3_2gf": "RegNetX-3.2GF",
    "mnasnet2_0": "MNASNet x2.0",
}
LINEAR_BORDER = ("mobilenet_v2", "mnasnet2_0")
QDROP_REGULARISER = {"mobilenet_v2": 0.1, "mnasnet2_0": 0.2}
WITH_QDROP_REGULARISER = ("adaround", "brecq", "qdrop")
SUFFIXES = (".safetensors", ".pth")


@dataclass(frozen=True)
class Row:
    """A row of the paper's tables: what it calls it, what it is here, and its top-1 in % by network."""

    label: str
    bits: str
    method: Method
    numbers: tuple[float | None, ...]
    border: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of the paper; ``baseline`` is float."""

    caption: str
    networks: tuple[str, ...]
    baseline: tuple[float, ...]
    rows: tuple[Row, ...]


ALL = tuple(NETWORKS)
# Table 2 gives the fourth network's baseline and nearest rounding as 73.53 and 6.11, Table 1 as 73.52 and 6.10.
BASELINE = (71.01, 76.62, 72.63, 73.53, 78.45, 76.52)
NONE = (None,) * 6
TABLES = {
    "table1": Table(
        "Table 1: Comparison of adjusted rounding (A-rounding) with nearest rounding (N-rounding)",
        ("resnet18", "resnet50", "regnet_x_600mf"),
        (71.01, 76.62, 73.52),
        (
            Row("N-rounding", "W32A2", "nearest", (40.22, 21.13, 6.10)),
            Row("A-rounding", "W32A2", "a_rounding", (54.99, 31.38, 16.53)),
        ),
    ),
    "table2": Table(
        "Table 2: Accuracy comparison on activation-only quantized models",
        ALL,
        BASELINE,
        (
            Row("Rounding", "W32A4", "nearest", (69.88, 75.10, 65.37, 70.50, 75.02, 72.36)),
            Row("QDrop", "W32A4", "qdrop", (69.70, 74.94, 65.20, 70.56, 74.76, 71.99)),
            Row("AQuant", "W32A4", "aquant", (70.12, 75.69, 68.78, 72.06, 77.44, 74.19)),
            Row("Rounding", "W32A2", "nearest", (40.22, 21.13, 0.31, 6.11, 8.59, 0.40)),
            Row("QDrop", "W32A2", "qdrop", (43.83, 21.95, 0.31, 7.24, 10.34, 0.23)),
            Row("AQuant", "W32A2", "aquant", (62.09, 61.59, 2.20, 44.27, 55.95, 13.24)),
        ),
    ),
    "table3": Table(
        "Table 3: Accuracy comparison on fully quantized models",
        ALL,
        BASELINE,
        (
            Row("AdaRound", "W4A4", "adaround", (69.49, 74.82, 67.53, 70.87, 76.41, 71.80)),
            Row("BRECQ", "W4A4", "brecq", (69.45, 75.05, 68.29, 70.96, 76.64, 73.24)),
            Row("QDrop", "W4A4", "qdrop", (69.61, 75.40, 68.57, 71.19, 76.76, 73.54)),
            Row("AQuant", "W4A4", "aquant", (70.03, 75.58, 69.15, 71.68, 77.03, 73.78)),
            Row("AdaRound", "W2A4", "adaround", (63.64, 66.61, 44.90, 58.95, 64.66, 51.03)),
            Row("BRECQ", "W2A4", "brecq", (64.84, 70.27, 53.43, 62.41, 71.21, 62.11)),
            Row("QDrop", "W2A4", "qdrop", (65.16, 70.71, 54.22, 63.59, 71.34, 63.78)),
            Row("AQuant", "W2A4", "aquant", (66.63, 71.11, 56.74, 65.71, 72.98, 65.27)),
            Row("AdaRound", "W3A3", "adaround", (66.00, 69.72, 48.92, 61.99, 68.65, 50.48)),
            Row("BRECQ", "W3A3", "brecq", (66.01, 71.73, 54.66, 63.79, 71.75, 64.16)),
            Row("QDrop", "W3A3", "qdrop", (66.65, 72.38, 57.68, 65.37, 72.69, 66.43)),
            Row("AQuant", "W3A3", "aquant", (67.97, 73.20, 58.56, 67.11, 74.09, 68.96)),
            Row("AdaRound", "W2A2", "adaround", NONE),
            Row("BRECQ", "W2A2", "brecq", (51.12, 51.36, 7.44, 29.84, 41.88, 13.32)),
            Row("QDrop", "W2A2", "qdrop", (54.19, 57.38, 11.45, 41.53, 54.61, 28.65)),
            Row("AQuant", "W2A2", "aquant", (60.31, 60.04, 14.19, 46.61, 57.48, 30.31)),
        ),
    ),
    "table4": Table(
        "Table 4: Impacts of border function and fusion",
        ("resnet18", "regnet_x_600mf"),
        (71.01, 73.53),
        (
            Row("Border function: linear", "W2A2", "aquant", (59.14, 45.37), {"form": "linear"}),
            Row("Border function: quadratic", "W2A2", "aquant", (60.31, 46.61)),
            Row("Border function: linear", "W3A3", "aquant", (67.59, 66.78), {"form": "linear"}),
            Row("Border function: quadratic", "W3A3", "aquant", (67.97, 67.11)),
            Row("Border fusion: none", "W2A2", "aquant", (58.56, 44.95), {"fusion": "none"}),
            Row("Border fusion: fusion", "W2A2", "aquant", (60.31, 46.61)),
            Row("Border fusion: none", "W3A3", "aquant", (67.76, 66.93), {"fusion": "none"}),
            Row("Border fusion: fusion", "W3A3", "aquant", (67.97, 67.11)),
        ),
    ),
}
"""Top-1 in %, as printed in "Efficient Activation Quantization via Adaptive Rounding Border for Post-Training
Quantization", sections 3 (Table 1) and 5 (Tables 2 to 4)."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a run share; ``iterations`` replaces the preset's."""

    preset: PresetName = "paper"
    seed: int = 0
    iterations: int | None = None


def float_cell(network: str, setting: Setting) -> Cell:
    """The float network, measured once: nothing of it is quantized."""
    return Cell("float", network, "W32A32", "nearest", setting.seed, "float", preset=setting.preset)


def cell_of(section: str, row: Row, network: str, setting: Setting) -> Cell:
    """The row's run on a network, with what is set for this network."""
    config: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    if row.method == "aquant":
        form = "linear" if network in LINEAR_BORDER else "quadratic"
        config["border"] = {"form": form, "fusion": "channel_mean", **row.border}
    if setting.iterations is not None and METHODS[row.method].reconstruct:
        config["iterations"] = setting.iterations
    if network in QDROP_REGULARISER and row.method in WITH_QDROP_REGULARISER and not row.bits.startswith("W32"):
        changes["settings"] = {"regulariser_weight": QDROP_REGULARISER[network]}
    return Cell(section, network, row.bits, row.method, setting.seed, row.label, config, setting.preset, changes)


def plan(
    setting: Setting,
    sections: Sequence[str] = tuple(TABLES),
    networks: Sequence[str] = ALL,
    methods: Sequence[str] | None = None,
    bits: Sequence[str] | None = None,
) -> list[Cell]:
    """The cells to be measured, the float networks first, so that unfit weights are found at once."""
    tables = {section: TABLES[section] for section in sections}
    used = [network for network in networks if any(network in table.networks for table in tables.values())]
    cells = [float_cell(network, setting) for network in used]
    for section, table in tables.items():
        for network in (network for network in used if network in table.networks):
            cells += [
                cell_of(section, row, network, setting)
                for row in table.rows
                if (methods is None or row.method in methods) and (bits is None or row.bits in bits)
            ]
    return cells


@dataclass(frozen=True)
class Score:
    """Measures a network on all validation images; ``given`` is kept beside: which images and weights those were."""

    validation: Validation
    given: dict[str, Any]

    def __call__(self, model: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, Any]:
        labels = self.validation.classes()
        logits = torch.cat([logits_of(model, images, device) for images in self.validation.batches()])
        return {
            "accuracy": {"quantized": accuracy(logits, labels)},
            "correct": packed(logits.argmax(1) == labels),
            "given": self.given,
        }


def weights_of(folder: Path, network: str) -> Path | None:
    """The network's file, if it is there."""
    return next((path for path in (folder / f"{network}{suffix}" for suffix in SUFFIXES) if path.is_file()), None)


def missing(imagenet: Path | None, weights: Path | None, networks: Sequence[str]) -> list[str]:
    """What is not there of what is needed, in words."""
    found = ["--imagenet FOLDER, with train/ and val/"] if imagenet is None else problems(imagenet)
    if weights is None:
        return [*found, "--weights FOLDER, with a state dict for each network"]
    if not weights.is_dir():
        return [*found, f"the folder of weights {weights}"]
    absent = [network for network in networks if weights_of(weights, network) is None]
    return found + [
        f"{weights / network}.safetensors or .pth, the weights of {NETWORKS[network]}" for network in absent
    ]


def refuse_other_inputs(cells: list[Cell], results: Results, given: dict[str, dict[str, Any]]) -> None:
    """Results of other images or weights are not continued.

    Raises:
        InputError: there are some.
    """
    for cell, result in ((cell, results.cells[cell.key]) for cell in cells if cell in results):
        other = [name for name, value in given[cell.network].items() if result["given"][name] != value]
        if other:
            raise InputError(
                f"{results.path} holds {cell.key!r}, measured with other inputs ({', '.join(other)}). Name another "
                "file with --results, or remove this one."
            )


def page(results: Results, setting: Setting, given: dict[str, Any]) -> str:
    """The four tables as Markdown, each measured number with the paper's beside it."""
    differing = [
        f"{what} {value} instead of {papers}"
        for what, value, papers in (
            ("preset", setting.preset, "paper"),
            ("iterations", setting.iterations or "the preset's", "the preset's"),
            ("validation images", given["images"], 50_000),
            ("size", given["size"], 224),
            ("calibration images", given["calibration images"], 1024),
        )
        if value != papers
    ]
    half = 196 * (0.25 / given["images"]) ** 0.5
    lines = [
        "# The paper's tables on ImageNet",
        "",
        f"Top-1 in %: measured (the paper's). Preset `{setting.preset}`, seed {setting.seed}, protocol `paper`, "
        f"{given['images']:,} validation images (95 % intervals of at most ± {half:.2f}), "
        f"{given['calibration images']:,} calibration images.",
        "",
    ]
    if differing:
        lines += [f"**Not the paper's setting**: {'; '.join(differing)}.", ""]
    lines += [
        "The paper builds on QDrop's code and with it on the weights that BRECQ publishes; where a float baseline "
        "differs from the paper's, compare losses against the baseline. Its rows of other methods are of their own "
        "codes and protocols, these of one engine.",
        "",
        f"`{command()}`" + (f", commit `{commit()[:12]}`." if commit() else "."),
    ]
    for section, table in TABLES.items():
        lines += ["", f"## {table.caption}", "", *_table(section, table, results, setting)]
    return "\n".join(lines) + "\n"


def _table(section: str, table: Table, results: Results, setting: Setting) -> Iterator[str]:
    yield "| method | bits | " + " | ".join(NETWORKS[network] for network in table.networks) + " |"
    yield "|---" * (2 + len(table.networks)) + "|"
    cells = [float_cell(network, setting) for network in table.networks]
    yield _line("float baseline", "W32A32", cells, table.baseline, results)
    for row in table.rows:
        cells = [cell_of(section, row, network, setting) for network in table.networks]
        yield _line(row.label, row.bits, cells, row.numbers, results)


def _line(label: str, bits: str, cells: list[Cell], numbers: Sequence[float | None], results: Results) -> str:
    entries = []
    for cell, number in zip(cells, numbers, strict=True):
        measured = f"{100 * results.cells[cell.key]['accuracy']['quantized']['top1']:.2f}" if cell in results else "-"
        entries.append(f"{measured} ({'-' if number is None else f'{number:.2f}'})")
    return f"| {label} | {bits} | {' | '.join(entries)} |"


def positive(text: str) -> int:
    """A whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [row for table in TABLES.values() for row in table.rows]
    methods, bits = (list(dict.fromkeys(words)) for words in ([r.method for r in rows], [r.bits for r in rows]))
    parser.add_argument("--imagenet", type=Path, metavar="FOLDER", help="with train/ and val/")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="with a state dict for each network")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "aquant-imagenet", metavar="FOLDER")
    parser.add_argument("--sections", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--bits", nargs="+", default=bits, choices=bits)
    parser.add_argument("--preset", default="paper", choices=get_args(PresetName))
    parser.add_argument("--iterations", type=positive, default=None, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of the runs, and of the calibration images")
    parser.add_argument(
        "--images", type=positive, default=None, help="validation images, from all classes; default: all"
    )
    parser.add_argument("--calibration", type=positive, default=1024, help="calibration images")
    parser.add_argument("--size", type=positive, default=224, help="of the images; they are cut from 8/7 of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=positive, default=1, help="cells measured at a time")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of each")
    parser.add_argument("--results", type=Path, default=RESULTS / "imagenet.json", metavar="FILE")
    parser.add_argument("--page", type=Path, default=None, metavar="FILE", help="where the tables are written, too")
    options = parser.parse_args()
    setting = Setting(options.preset, options.seed, options.iterations)
    cells = plan(setting, options.sections, options.networks, options.methods, options.bits)
    networks = list(dict.fromkeys(cell.network for cell in cells))
    absent = missing(options.imagenet, options.weights, networks)
    if absent:
        parser.error("missing: " + "; ".join(absent))
    results = Results(options.results)
    options.cache.mkdir(parents=True, exist_ok=True)
    try:
        calibration = draw_calibration(options.imagenet, options.calibration, options.size, options.seed, options.cache)
        validation = Validation.prepare(options.imagenet, options.images, options.size, options.cache)
        of_images = {
            "images": len(validation),
            "size": options.size,
            "validation": validation.digest,
            "calibration images": options.calibration,
            "calibration": sha256(calibration),
        }
        files = {network: weights_of(options.weights, network) for network in networks}
        given = {network: {**of_images, "weights": sha256(path)} for network, path in files.items() if path}
        refuse_other_inputs(cells, results, given)
    except InputError as error:
        parser.error(str(error))

    def images(network: str) -> Images:
        score = Score(validation, given[network])
        return Images(str(files[network]), calibration, validation.sample, network, score)

    sweep(cells, results, images, options.processes, options.threads, options.device)
    text = page(results, setting, of_images)
    print(text)
    if options.page is not None:
        options.page.write_text(text)


if __name__ == "__main__":
    main()
