"""A job's report as a page: who asked for one, and the answer."""

from __future__ import annotations

import hashlib
import json
import logging

from fastapi import Response
from pydantic import ValidationError

from aquant_core.report.page import content_policy, render
from service.api.conditions import entity_tag, is_current

log = logging.getLogger(__name__)


def prefers_page(accept: str | None) -> bool:
    """Whether an Accept header would rather have HTML than JSON; among equals JSON goes first, as without a header.

    A browser names HTML and takes anything else for less; clients of the API name JSON, or say that they take
    anything.
    """
    return _quality(accept or "", "text", "html") > _quality(accept or "*/*", "application", "json")


def _quality(accept: str, kind: str, subtype: str) -> float:
    """What the most specific range that covers the type gives it, 0 where none does (RFC 9110, 12.5.1)."""
    found: dict[str, float] = {}
    for entry in accept.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        weights = [parameter[2:] for parameter in parameters if parameter.startswith("q=")]
        try:
            found[name] = float(weights[0]) if weights else 1.0
        except ValueError:
            continue  # a range that cannot be read asks for nothing
    return next((found[name] for name in (f"{kind}/{subtype}", f"{kind}/*", "*/*") if name in found), 0.0)


def page_of(body: bytes, origin: str, if_none_match: str | None) -> Response | None:
    """The report's bytes as a page, which has an ETag of its own; None where this version cannot show them.

    Args:
        body: the stored JSON.
        origin: a sentence on the job that it is of.
        if_none_match: the request's header.
    """
    try:
        page = render(json.loads(body), origin).encode()
    except ValidationError as error:
        log.warning("a report cannot be shown as a page: %s", error)
        return None
    tag = entity_tag(hashlib.sha256(page).hexdigest())
    headers = {
        "ETag": tag,
        "Cache-Control": "no-cache",
        "Vary": "Accept",
        "Content-Security-Policy": f"{content_policy()}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if is_current(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    return Response(page, media_type="text/html", headers=headers)
