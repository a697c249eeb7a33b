"""A report of an earlier version, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def old_report() -> dict[str, Any]:
    """Of version 0.2.0, on the residual example network with preset smoke, QDrop beside AQuant."""
    document: dict[str, Any] = json.loads((Path(__file__).parent / "report-0.2.json").read_text())
    return document
