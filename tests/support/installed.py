"""What an installation knows of the project besides its modules: the entry points that pyproject.toml declares."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    """pyproject.toml's table of that name."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def metadata(folder: Path) -> Path:
    """Makes the project's ``dist-info`` in ``folder`` and returns it.

    First on the path, it stands for the installed one, which in an editable installation may be of an older
    pyproject.toml.
    """
    declared = project()
    info = folder / f"{declared['name'].replace('-', '_')}-{declared['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {declared['name']}\nVersion: {declared['version']}\n")
    groups = {"console_scripts": declared["scripts"], **declared["entry-points"]}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder
