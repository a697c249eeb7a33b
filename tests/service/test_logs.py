"""Log lines of a real process: JSON with what they are about, or text."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

PROGRAM = """
import contextvars, logging, sys, threading, warnings
from pathlib import Path
from service.logs import about, set_up_logging
from service.settings import Settings

set_up_logging(Settings())
log = logging.getLogger("aquant_core.some")
log.info("before")
with about(request_id="r1"), about(job_id="j1", attempt=2, nothing=None):
    log.info("job %s: %d lines\\nin one", "j1", 2)
    within = contextvars.copy_context()
    thread = threading.Thread(target=within.run, args=(log.warning, "from a thread"))
    thread.start()
    thread.join()
    warnings.warn("careful", stacklevel=1)
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("failed")
log.info("after")
"""

SERVER = """
import uvicorn
from service.main import create_app
from service.settings import Settings

class Server(uvicorn.Server):
    async def main_loop(self):
        pass

Server(uvicorn.Config("service.main:application", factory=True, port=0)).run()
"""


def lines_of(program: str, folder: Path, log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            "PYTHONPATH": ":".join(sys.path),
            "AQUANT_LOG_FORMAT": log_format,
            "AQUANT_DATA_DIR": str(folder),
            "AQUANT_BROKER_URL": "redis://127.0.0.1:1/0",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_lines_say_what_they_are_about(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in lines_of(PROGRAM, tmp_path, "json")]
    assert [line["message"].split("\n")[0] for line in lines[:3]] == ["before", "job j1: 2 lines", "from a thread"]
    assert [line["level"] for line in lines] == ["INFO", "INFO", "WARNING", "WARNING", "ERROR", "INFO"]
    about = {"request_id": "r1", "job_id": "j1", "attempt": 2}
    assert all(about.items() <= line.items() for line in lines[1:5])
    assert all(line.keys() == {"timestamp", "level", "logger", "message"} for line in (lines[0], lines[-1]))
    assert lines[0]["logger"] == "aquant_core.some"
    assert datetime.now(UTC) - datetime.fromisoformat(lines[0]["timestamp"]) < timedelta(minutes=5)
    assert "careful" in lines[3]["message"]
    assert "ZeroDivisionError" in lines[4]["exc_info"]


def test_text_is_for_people(tmp_path: Path) -> None:
    lines = lines_of(PROGRAM, tmp_path, "text")
    assert lines[0].endswith(" INFO aquant_core.some: before")


def test_the_web_servers_lines_are_json_too(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in lines_of(SERVER, tmp_path, "json")]
    assert any("startup complete" in line["message"] for line in lines)
    assert not any("color_message" in line for line in lines)
