"""Kills a quantization at random moments and resumes it, until it ends: does it end with an undisturbed run's bytes?

    python benchmarks/resume.py --kills 20

A child quantizes the residual example net with ``resume_from``; it is sent SIGKILL after a random part of the time
that the latest undisturbed run took, and started again on the same folder. When a run ends before its kill, its
checkpoint is compared and the next begins from the start.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples" / "fashion_mnist"
RESULTS = Path(__file__).parent / "results" / "resume.json"
CONFIG = {"weight_bits": 2, "activation_bits": 2, "iterations": 20, "sensitivity": False}
IMAGES = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        quantize(*options.child)
        return
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="aquant-resume-") as name:
        folder = Path(name)
        started = time.monotonic()
        start(folder / "whole", folder / "whole.safetensors").wait()
        seconds = time.monotonic() - started
        wanted = digest(folder / "whole.safetensors")
        kills: list[dict[str, Any]] = []
        digests: list[str] = []
        while len(kills) < options.kills or unfinished(folder):
            from_start, began = not unfinished(folder), time.monotonic()
            child = start(folder / "blocks", folder / "result.safetensors")
            moment = draw.uniform(0, seconds)
            if len(kills) < options.kills:
                try:
                    child.wait(moment)
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    finished = len(list((folder / "blocks").glob("*.safetensors")))
                    kills.append({"after_seconds": round(moment, 2), "blocks_finished": finished})
                    print(f"kill {len(kills)} after {moment:.1f} s: {finished} blocks are finished", flush=True)
                    continue
            if child.wait() != 0:
                raise SystemExit("a resumed run failed")
            if from_start:
                seconds = time.monotonic() - began  # other work on the machine may have gone, or come
            digests.append(digest(folder / "result.safetensors"))
            print("a run ended:", "the same bytes" if digests[-1] == wanted else "OTHER BYTES", flush=True)
            shutil.rmtree(folder / "blocks")
    from record import command, commit

    from aquant_core.reporting import versions

    result = {
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "seed": options.seed,
        "config": CONFIG,
        "images": IMAGES,
        "undisturbed": {"seconds_of_the_latest": round(seconds, 2), "sha256": wanted},
        "kills": kills,
        "ended_runs": len(digests),
        "ended_with_the_same_bytes": digests.count(wanted),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(kills)} kills; {digests.count(wanted)} of {len(digests)} runs ended with the undisturbed bytes")
    if set(digests) != {wanted}:
        raise SystemExit(1)


def unfinished(folder: Path) -> bool:
    """Whether a killed run has still to be brought to its end."""
    return (folder / "blocks").exists()


def start(blocks: Path, result: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--child", str(blocks), str(result)])


def quantize(blocks: Path, result: Path) -> None:
    """What the child does."""
    import aquant_core

    images = aquant_core.read_images(EXAMPLES / "calibration.npz").images[:IMAGES]
    config = aquant_core.QuantizationConfig.model_validate(CONFIG)
    aquant_core.quantize(EXAMPLES / "residual.onnx", images, config, resume_from=blocks).save(result)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
