"""The harness of faults runs, and finds nothing wrong in a short run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["faults", "--faults", "3", "--every", "1", "--workers", "1"], {"wrong": []}),
        (["drain", "--jobs", "3", "--workers", "1"], {"wrong": [], "pages": 1}),
    ],
)
def test_a_short_run_ends_with_nothing_wrong(arguments: list[str], expected: dict[str, object], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    argv = [sys.executable, ROOT / "benchmarks" / "chaos.py", *arguments, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COMMIT": "none"}
    run = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(out.read_text())
    assert expected.items() <= found.items()
    assert found["about"]["commit"] == "none"
