"""Headless Chromium as the system has it, and a page of it that notes everything it should not have to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import axe_playwright_python
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@contextmanager
def chromium() -> Iterator[Browser | str]:
    """The browser, or why there is none."""
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        yield f"no Chromium: none of {', '.join(BINARIES)} is on PATH (Debian: apt-get install chromium)"
        return
    with sync_playwright() as playwright:
        # --no-sandbox: it is this service alone that is looked at, and containers have no user namespaces.
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, and what has gone wrong in it: messages on the console, uncaught errors, requests to elsewhere."""

    page: Page
    host: str
    faults: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(text in message.text for text in self.expected):
            self.faults.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https") and parts.netloc != self.host:
            self.faults.append(f"request to {request.url}")

    def violations(self, *schemes: str) -> list[str]:
        """What axe finds: everything in the first colour scheme, contrast in the others."""
        found = []
        for index, scheme in enumerate(schemes):
            self.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            if index == 0:
                self.page.evaluate(AXE.read_text())  # not as a script element, which the policy of the page forbids
            only = {"type": "tag", "values": RULES} if index == 0 else {"type": "rule", "values": ["color-contrast"]}
            result: dict[str, Any] = self.page.evaluate("only => axe.run(document, {runOnly: only})", only)
            assert result["passes"]
            found += [
                f"{scheme}: {violation['id']} at {node['target']}: {node['failureSummary']}"
                for violation in result["violations"]
                for node in violation["nodes"]
            ]
        return found
