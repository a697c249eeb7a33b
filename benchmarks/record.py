"""What every benchmark writes beside its numbers, and how it takes times."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from aquant_core.reporting import versions

RESULTS = Path(__file__).parent / "results"


def about(device: torch.device, **settings: Any) -> dict[str, Any]:
    """Where, with what and how it was measured."""
    packages = versions()
    if device.type == "cuda":
        import cupy

        packages |= {"cuda": str(torch.version.cuda), "cupy": cupy.__version__}
    return {
        "command": command(),
        "commit": commit(),
        "versions": packages,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **settings,
    }


def device_name(device: torch.device) -> str:
    """The card's, or the processor's: libraries choose their loops by it, so other bytes may come of another."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (
            f"{next(line for line in lines if line.startswith('model name')).partition(': ')[2]} ({platform.machine()})"
        )
    return platform.machine()


def command() -> str:
    """As it was called."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def commit() -> str:
    """What ``COMMIT`` says, else of the checkout, marked where what is measured has changed since."""
    if os.environ.get("COMMIT") or not shutil.which("git"):
        return os.environ.get("COMMIT", "")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    measured = ["git", "status", "--porcelain", "--", ":/aquant_core", ":/cupy_kernels"]
    changed = subprocess.run(measured, capture_output=True, text=True, check=False).stdout.strip()
    return git.stdout.strip() + (" with changes" if changed else "")


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def replayable(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``run`` without the host's share: on a GPU captured as a CUDA graph, else itself."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    held = graph, run  # the graph reads and writes what ``run`` holds
    return lambda: held[0].replay()


def microseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Mean time of one call over ``repeats`` calls in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return 1e6 * (time.perf_counter() - started) / repeats


def in_turns(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Microseconds of each run by round, in turns, so that a change of the machine's pace meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        microseconds(run, device, min(repeats, 3))
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(microseconds(run, device, repeats))
    return times


def ratio(times: Mapping[str, list[float]], name: str, other: str) -> float:
    """Median over the rounds of one run's time by another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
