"""What a test asks of the service's answers."""

from __future__ import annotations

from typing import Any

from httpx import Response


def refused(answer: Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of an answer that is to be a refusal of this kind."""
    assert answer.status_code == status, answer.text
    document: dict[str, Any] = answer.json()
    assert document["code"] == code
    return document
