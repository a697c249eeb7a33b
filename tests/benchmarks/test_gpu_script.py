"""The script for a GPU machine, rehearsed without one, so that it works there the first time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def test_every_step_runs_at_toy_sizes(tmp_path: Path) -> None:
    environment = os.environ | {"RESULTS": str(tmp_path), "PYTHON": sys.executable, "COMMIT": "none"}
    done = subprocess.run([SCRIPT, "--rehearse"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(written) == {
        "inference_cpu.json", "kernels_cpu.json", "reconstruction_cpu.json", "full_residual_cpu.json"
    }  # fmt: skip
    for results in written.values():
        assert results["about"]["device"]
        assert {"torch", "python"} <= set(results["about"]["versions"])
        assert results["about"]["command"].startswith("python benchmarks/")
    assert written["inference_cpu.json"]["networks"]["mobilenet_v2"]["border, channel_mean"]["over_nearest"] > 0
    assert "reference, channel_mean" in written["kernels_cpu.json"]["layers"]["conv1"]["inference"]
    assert written["full_residual_cpu.json"]["seconds"] > 0


def test_a_failed_step_is_named_and_the_others_run(tmp_path: Path) -> None:
    environment = os.environ | {"RESULTS": str(tmp_path), "PYTHON": "false"}
    done = subprocess.run([SCRIPT, "--full", "resnet18"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 failed: full resnet18" in done.stdout


def test_an_unknown_option_is_answered_with_the_usage() -> None:
    done = subprocess.run([SCRIPT, "--fast"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--rehearse" in done.stdout
