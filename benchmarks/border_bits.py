"""What it costs to store border parameters in 8 bits instead of fp16: accuracy and bytes, side by side in one run.

    python benchmarks/border_bits.py --digits examples/digits/data

AQuant at W2A2 by the ``fast`` preset on the three example networks, each seed with either width; borders are rounded
when their block is finished, so what comes behind is learned on what they have become. All 10,000 test images, as in
``accuracy.py``. Cells are kept in ``benchmarks/results/border_bits.json``; those that are there are not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accuracy import NETWORKS, ROOT, TestImages
from cells import Cell, Images, Results, difference, sweep, unpacked
from record import RESULTS

BITS = (16, 8)
SEEDS = (0, 1, 2)


def plan(seeds: list[int]) -> list[Cell]:
    """Every network and width, seed by seed."""
    return [cell_of(network, bits, seed) for seed in seeds for network in NETWORKS for bits in BITS]


def cell_of(network: str, bits: int, seed: int) -> Cell:
    return Cell("border bits", network, "W2A2", "aquant", seed, f"{bits}-bit borders", {"border": {"bits": bits}})


def table(results: Results, seeds: list[int]) -> str:
    """A row a network, of the seeds that are finished with both widths; accuracies and differences in points."""
    rows = ["| network | seeds | fp16 | 8 bits | difference | border bytes |", "|---|---|---|---|---|---|"]
    for network in NETWORKS:
        pairs = [[cell_of(network, bits, seed) for bits in BITS] for seed in seeds]
        found = [results.of(pair) for pair in pairs if all(cell in results for cell in pair)]
        if not found:
            continue
        wide, narrow = ([pair[index] for pair in found] for index in range(2))
        right = [[unpacked(result) for result in side] for side in (wide, narrow)]
        mean, half = difference(right[1], right[0])
        tops = [sum(map(float, (r.mean() for r in side))) / len(side) for side in right]
        sizes = [side[0]["size"]["border_bytes"] for side in (wide, narrow)]
        rows.append(
            f"| {network} | {len(found)} | {100 * tops[0]:.2f} | {100 * tops[1]:.2f} | {100 * mean:+.2f} ± "
            f"{100 * half:.2f} | {sizes[0]:,} -> {sizes[1]:,} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), metavar="FOLDER")
    parser.add_argument("--digits", type=Path, default=ROOT / "examples" / "digits" / "data", metavar="FOLDER")
    parser.add_argument("--processes", type=int, default=1, help="cells measured at a time")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    options = parser.parse_args()
    results = Results(RESULTS / "border_bits.json")
    folders = {"fashion_mnist": options.fashion, "digits": options.digits}

    def images(network: str) -> Images:
        here = ROOT / "examples" / NETWORKS[network]
        return Images(str(here / f"{network}.onnx"), here / "calibration.npz", TestImages(folders[NETWORKS[network]]))

    if not options.table:
        cells = [cell for cell in plan(options.seeds) if cell.network in options.networks]
        sweep(cells, results, images, options.processes, threads=1, device="cpu")
    print(table(results, options.seeds))


if __name__ == "__main__":
    main()
