"""The benchmark of capacity runs, on either database."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from servers import DATABASES, Storage

CAPACITY = Path(__file__).parent.parent.parent / "benchmarks" / "capacity.py"


@pytest.mark.parametrize("storage", DATABASES, indirect=True)
def test_every_number_is_measured(storage: Storage, tmp_path: Path) -> None:
    out = tmp_path / "capacity.json"
    brief = ["--seconds", "0.2", "--queues", "40", "80", "--writers", "2", "--out", str(out)]
    address = [] if storage.database_url is None else ["--database-url", storage.database_url]
    subprocess.run([sys.executable, CAPACITY, *brief, *address], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    assert all(found[f"{what}_a_second"] > 0 for what in ("renewals", "announcements", "polls"))
    assert [one["jobs"] for one in found["queues"]] == [40, 80]
    assert all(one["claim_ms"] > 0 for one in found["queues"])
    assert found["bytes_a_job"] > 0
