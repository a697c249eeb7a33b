"""What a browser would make of a page: its tags, what it loads and leads to, its words."""

from __future__ import annotations

from html.parser import HTMLParser


class Outline(HTMLParser):
    """Tags of a page, its scripts, event handlers and links."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str | None] = []
        self.handlers: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "script":
            self.scripts.append(values.get("src"))
        self.handlers += [name for name in values if name.startswith("on") or name == "style"]
        self.addresses += [values[name] or "" for name in ("href", "src", "action") if name in values]

    def handle_data(self, data: str) -> None:
        self.words += data
