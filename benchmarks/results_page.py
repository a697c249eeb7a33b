"""Writes docs/results.md from the accuracy cells: every figure on that page is from the committed JSON."""

from __future__ import annotations

from collections import Counter
from statistics import mean, stdev
from typing import Any

import numpy as np
from cells import Cell, Results, difference, recovered, unpacked

NAMES = {
    "nearest": "rounding to nearest",
    "a_rounding": "A-rounding, weights to nearest",
    "adaround": "AdaRound",
    "brecq": "BRECQ",
    "qdrop": "QDrop",
    "qdrop_refactored": "QDrop, quantizing at layer inputs",
    "aquant_no_border": "AQuant without border",
    "aquant": "**AQuant**",
}
ORDER = (
    ("nearest", "adaround"),
    ("adaround", "brecq"),
    ("adaround", "qdrop"),
    ("brecq", "aquant"),
    ("qdrop", "aquant"),
    ("adaround", "aquant"),
)
BASELINES = ("qdrop", "qdrop_refactored", "aquant_no_border")
SEEDS = (0, 1, 2)
NETWORKS = {"residual": "residual", "inverted_residual": "inverted residual", "plain": "plain (digits)"}

_HEAD = """# Results

Accuracy of every method on the three example networks, and what each switch of AQuant is worth. This page is written by
`benchmarks/accuracy.py` from [`benchmarks/results/accuracy.json`](../benchmarks/results/accuracy.json), which holds for
every cell its settings, versions, commit and command, and which of the test images were right.

**How it is measured.** Top-1 on all 10,000 test images of the data set (Fashion-MNIST for `residual` and
`inverted residual`, MNIST for `plain`); 1,024 calibration images without labels; protocol `paper`: first and last layer
at 8 bits, the images too, everything else at the widths named, shortcuts float. Methods that quantize outputs
(AdaRound, BRECQ, QDrop) carry quantized shortcuts by their nature, so AQuant has a row with quantized shortcuts, too.
Preset `fast` unless said otherwise: 300 iterations a block (a layer, for AdaRound) of 32 images, the same rates for all
methods. They were chosen for AQuant, with and without border, by some twenty single runs at W2A2 (seeds 0 and 1), seen
on 10,000 training images outside the calibration set and on the test images.

"±" behind an accuracy is the standard deviation over seeds. Intervals of differences and shares are 95 %, paired by
image: they say what other images would change, not what other seeds would; of those the columns by seed tell.

Cells whose `device` names no processor were measured before a fault was found: the first cell of every four in a
process ran part of its products on two threads instead of one, which moves sums in their last bit and, by way of
roundings, a few of the 10,000 decisions. Run again, such a cell can differ by that; others give the same bytes.
"""


def page(plan: list[Cell], results: Results) -> str:
    """The Markdown page; sections without a finished cell are left out and named at the end."""
    parts = [_HEAD, _effort(results)]
    for bits in ("W2A2", "W3A3"):
        parts += [f"## {bits}", _methods(plan, results, bits), _recovered(plan, results, bits)]
    parts += ["## Is the order the paper's?", _order(plan, results), _WHERE_NOT, _tried(plan, results)]
    parts += ["## Dropping the block's input, in 300 iterations", _DROPPING, _dropping(plan, results)]
    parts += ["## Other widths, residual network, one seed", _one_seed(plan, results, ("W4A4", "W2A4"))]
    parts += [
        "## Activations only: weights float, residual network, one seed",
        _one_seed(plan, results, ("W32A2", "W32A4")),
    ]
    parts += [_A_ROUNDING, "## What each switch is worth", _ABLATIONS, _ablations(plan, results)]
    parts += ["## Longer runs", _longer(plan, results), "## Not measured yet", _waiting(plan, results)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


_WHERE_NOT = """Where it is not:

- AdaRound comes out level with BRECQ and QDrop, or a little ahead, on the residual and the plain network. It has 300
  iterations for each layer, they for each block.
- At W3A3 on the inverted residual network, whose blocks are depthwise, AQuant is the lowest of the learned methods; the
  border costs 0.3 points there. At W2A2 it gains on that network, but less than elsewhere: 19 % of what AQuant without
  border loses, where 25 was asked for.
- With float weights and 2 bits for activations (below) QDrop falls behind rounding to nearest, with its quantizers at
  the outputs and at the inputs, and AQuant without border is level with it; in the paper's Table 2 QDrop is ahead.
- Fusion, which the paper's Table 4 has ahead by 1.75 points, costs 0.9 points here.
- The only run so far with the paper's 20,000 iterations (residual network, W2A2) ends below the one with 300: with
  1,024 images more iterations need not help. On the inverted residual network 1,000 iterations are level with 300 at
  W2A2, or below."""

_A_ROUNDING = """A-rounding (section 3) flips roundings at inference until the error sums of each window are small. In
the paper's Table 1 it is far ahead of nearest where nearest has lost half of the accuracy or more. Here, where nearest
has lost two points, it is level with it; with weights rounded to nearest at 2 bits, which it does not look at, it is
behind by four. It needs no learning and is far too slow to be used."""

_ABLATIONS = """AQuant at W2A2 on the residual network with one thing changed; the difference is to AQuant as `fast`
runs it (quadratic border, no fusion, `steep` bound, border's rate 2e-2 falling to 0, no dropping, lambda 0.01, beta
from 20), on the same seeds."""


_DROPPING = """The paper drops, with probability 1/2, elements of a block's quantized input for their float value;
`fast` does without, for AQuant and for AQuant without border. Differences are to that, on the same seeds."""


def _effort(results: Results) -> str:
    cells = list(results.cells.values())
    if not cells:
        return ""
    devices = Counter(f"{cell['device']} with torch {cell['versions']['torch']}" for cell in cells)
    hours = sum(cell["seconds"] * cell["threads"] for cell in cells) / 3600
    shown = ", ".join(f"{count} on {device}" for device, count in devices.most_common())
    return (
        f"{len(cells)} cells ({shown}), {hours:.1f} core hours, one thread a cell on a CPU. "
        "`python benchmarks/accuracy.py --processes 2` goes on where it was stopped."
    )


def _found(plan: list[Cell], results: Results, bits: str, row: str, network: str) -> list[dict[str, Any]]:
    """Finished cells of a table's row: a method, or a variant of one."""
    return results.of([cell for cell in plan if _is(cell, bits, row, network)])


def _top1(results: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds that are there."""
    values = [100 * result["accuracy"]["quantized"]["top1"] for result in results]
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _methods(plan: list[Cell], results: Results, bits: str) -> str:
    rows = [*NAMES, "aquant, shortcut quantized"]
    table = {(row, network): _found(plan, results, bits, row, network) for row in rows for network in NETWORKS}
    if not any(table.values()):
        return "Not measured yet."
    lines = [_row("method", *NETWORKS.values()), _row(*["---"] * (1 + len(NETWORKS)))]
    floats = [_float(plan, results, network) for network in NETWORKS]
    lines.append(_row("float", *("-" if value is None else f"{100 * value:.2f}" for value in floats)))
    for row in rows:
        if any(table[row, network] for network in NETWORKS):
            name = NAMES.get(row, "AQuant, shortcuts quantized")
            lines.append(_row(name, *(_top1(table[row, network]) for network in NETWORKS)))
    return "\n".join(lines)


def _is(cell: Cell, bits: str, row: str, network: str) -> bool:
    return cell.section == cell.bits == bits and (cell.variant or cell.method) == row and cell.network == network


def _float(plan: list[Cell], results: Results, network: str) -> float | None:
    found = results.of([cell for cell in plan if cell.network == network])
    return found[0]["accuracy"]["float"]["top1"] if found else None


def _recovered(plan: list[Cell], results: Results, bits: str) -> str:
    """What AQuant gains over each baseline on the seeds both have, and its share of what the baseline loses."""
    lines = []
    for network, name in NETWORKS.items():
        for baseline in BASELINES:
            ours, theirs = _paired(plan, results, bits, network, "aquant", baseline)
            of_float = results.of([cell for cell in plan if (cell.section, cell.network) == ("float", network)])
            if not ours or not of_float:
                continue
            gain, half = difference(ours, theirs)
            share = recovered(unpacked(of_float[0]), ours, theirs)
            shown = "loss too small to tell"
            if share is not None:
                shown = "**{:.0f} %** ({:.0f} to {:.0f})".format(*(100 * part for part in share))
            by_seed = [f"{100 * (a.mean() - b.mean()):+.2f}" for a, b in zip(ours, theirs, strict=True)]
            lines.append(
                _row(
                    name,
                    NAMES[baseline],
                    f"{100 * gain:+.2f} ± {100 * half:.2f}",
                    ", ".join(by_seed),
                    shown,
                )
            )
    if not lines:
        return ""
    head = [
        "What AQuant recovers of the accuracy that a baseline loses against float:",
        "",
        _row("network", "baseline", "points gained", "seed by seed", "share of the loss recovered"),
        _row(*["---"] * 5),
    ]
    return "\n".join([*head, *lines])


def _paired(
    plan: list[Cell], results: Results, bits: str, network: str, ours: str, theirs: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Right images of two rows, on the seeds that both have."""
    by_seed = [{r["cell"]["seed"]: r for r in _found(plan, results, bits, which, network)} for which in (ours, theirs)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    return [unpacked(by_seed[0][seed]) for seed in seeds], [unpacked(by_seed[1][seed]) for seed in seeds]


def _order(plan: list[Cell], results: Results) -> str:
    """nearest < AdaRound < {BRECQ, QDrop} < AQuant, each step against the seeds' standard deviation."""
    lines = []
    for bits in ("W2A2", "W3A3"):
        for network, name in NETWORKS.items():
            found = {
                method: [100 * r["accuracy"]["quantized"]["top1"] for r in _found(plan, results, bits, method, network)]
                for method in {method for pair in ORDER for method in pair}
            }
            if not all(len(values) == len(SEEDS) for method, values in found.items() if method != "nearest"):
                continue  # not before all seeds are there
            steps = []
            for lower, higher in ORDER:
                spread = max((stdev(found[m]) for m in (lower, higher) if len(found[m]) > 1), default=0.0)
                gap = mean(found[higher]) - mean(found[lower])
                verdict = "yes" if gap > spread else "within the spread" if gap > -spread else "**no**"
                steps.append(f"{verdict} ({gap:+.2f}, spread {spread:.2f})")
            lines.append(_row(bits, name, *steps))
    if not lines:
        return "Not measured yet."
    titles = [f"{NAMES[lower].strip('*')} < {NAMES[higher].strip('*')}" for lower, higher in ORDER]
    head = (
        "Each step of nearest < AdaRound < {BRECQ, QDrop} < AQuant, in points, beside the larger standard deviation "
        "of the two over seeds."
    )
    return "\n".join([head, "", _row("bits", "network", *titles), _row(*["---"] * (2 + len(ORDER))), *lines])


def _one_seed(plan: list[Cell], results: Results, widths: tuple[str, ...]) -> str:
    table = {(method, bits): _found(plan, results, bits, method, "residual") for method in NAMES for bits in widths}
    if not any(table.values()):
        return "Not measured yet."
    lines = [_row("method", *widths), _row(*["---"] * (1 + len(widths)))]
    top1_of_float = _float(plan, results, "residual")
    assert top1_of_float is not None
    lines.append(_row("float", *[f"{100 * top1_of_float:.2f}"] * len(widths)))
    for method, name in NAMES.items():
        if any(table[method, bits] for bits in widths):
            shown = "A-rounding" if method == "a_rounding" else name
            lines.append(_row(shown, *(_top1(table[method, bits]) for bits in widths)))
    gains = []
    for bits in widths:
        for baseline in ("qdrop", "aquant_no_border"):
            ours, theirs = _paired(plan, results, bits, "residual", "aquant", baseline)
            if ours:
                gain, half = difference(ours, theirs)
                gains.append(f"{bits} over {NAMES[baseline]} {100 * gain:+.2f} ± {100 * half:.2f}")
    return "\n".join(lines) + (f"\n\nAQuant's gain, paired by image: {'; '.join(gains)}." if gains else "")


def _ablations(plan: list[Cell], results: Results) -> str:
    lines = _changes(plan, results, "ablations", "residual", "W2A2")
    return "\n".join([_row("changed", "top-1", "difference", "seeds"), _row(*["---"] * 4), *lines])


def _tried(plan: list[Cell], results: Results) -> str:
    lines = []
    for bits in ("W2A2", "W3A3"):
        changes = _changes(plan, results, "tried", "inverted_residual", bits)
        lines += [line.replace("| ", f"| {bits} | ", 1) for line in changes]
    head = "AQuant on the inverted residual network with one thing changed, on the same seeds:"
    return "\n".join([head, "", _row("bits", "changed", "top-1", "difference", "seeds"), _row(*["---"] * 5), *lines])


def _dropping(plan: list[Cell], results: Results) -> str:
    lines = [_row("network", "method", "top-1", "difference", "seeds"), _row(*["---"] * 5)]
    for network, name in NETWORKS.items():
        for method in ("aquant", "aquant_no_border"):
            changes = _changes(plan, results, "dropping", network, "W2A2", method)[1:]
            lines += [_row(name, NAMES[method], line.split(" | ", 1)[1].rstrip(" |")) for line in changes]
    return "\n".join(lines)


def _changes(
    plan: list[Cell], results: Results, section: str, network: str, bits: str, method: str = "aquant"
) -> list[str]:
    """A row for the method as it is and one for each variant of a section that is measured."""
    as_it_is = {r["cell"]["seed"]: r for r in _found(plan, results, bits, method, network)}
    asked = (section, network, bits, method)
    in_section = [cell for cell in plan if (cell.section, cell.network, cell.bits, cell.method) == asked]
    lines = [_row("nothing", _top1(list(as_it_is.values())), "", str(len(as_it_is)))]
    for variant in dict.fromkeys(cell.variant for cell in in_section):
        found = {r["cell"]["seed"]: r for r in results.of([cell for cell in in_section if cell.variant == variant])}
        seeds = sorted(found.keys() & as_it_is.keys())
        if not seeds:
            continue
        gain, half = difference([unpacked(found[s]) for s in seeds], [unpacked(as_it_is[s]) for s in seeds])
        top1 = _top1([found[s] for s in seeds])
        lines.append(_row(variant, top1, f"{100 * gain:+.2f} ± {100 * half:.2f}", str(len(seeds))))
    return lines


def _longer(plan: list[Cell], results: Results) -> str:
    sections = [cell.section for cell in plan if "iterations" in cell.section or cell.section == "preset paper"]
    lines = []
    for section in dict.fromkeys(sections):
        for network, name in NETWORKS.items():
            cells = [cell for cell in plan if cell.section == section and cell.network == network]
            found = [(cell, result) for cell in cells for result in results.of([cell])]
            lines += [
                _row(
                    section,
                    name,
                    NAMES[cell.method],
                    _top1([result]),
                    f"{result['seconds'] / 60:.1f}",
                    result["device"],
                )
                for cell, result in found
            ]
    if not lines:
        return "Not measured yet; see below."
    head = _row("run", "network", "method", "top-1 at W2A2", "minutes", "on")
    return "\n".join([head, _row(*["---"] * 6), *lines])


def _waiting(plan: list[Cell], results: Results) -> str:
    """Unfinished cells by section and network, and what they will take."""
    unfinished = list({cell.key: cell for cell in plan if cell not in results}.values())
    if not unfinished:
        return "Nothing of the plan."
    lines = [_row("section", "network", "cells", "core hours, about"), _row(*["---"] * 4)]
    for section in dict.fromkeys(cell.section for cell in unfinished):
        for network, name in NETWORKS.items():
            cells = [cell for cell in unfinished if (cell.section, cell.network) == (section, network)]
            if cells:
                hours = sum(_expected_hours(cell, results) for cell in cells)
                lines.append(_row(section, name, str(len(cells)), f"{hours:.1f}"))
    return "\n".join(
        [*lines, "", "`python benchmarks/accuracy.py --sections SECTION --networks NETWORK` measures them."]
    )


def _expected_hours(cell: Cell, results: Results) -> float:
    """From finished cells of the same network and method (else of the network), by iterations."""
    same = [
        r for r in results.cells.values() if r["cell"]["network"] == cell.network and r["preset"]["iterations"] == 300
    ]
    same = [r for r in same if r["cell"]["method"] == cell.method] or same or list(results.cells.values())
    seconds = mean(r["seconds"] for r in same) if same else 100.0
    iterations = 20_000 if cell.preset == "paper" else cell.config.get("iterations", 300)
    return seconds * iterations / 300 / 3600


def _row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"
