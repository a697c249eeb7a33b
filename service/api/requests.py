"""What happens to every request on its way in and out: it gets an id, its time is taken, and no error escapes."""

from __future__ import annotations

import re
import secrets
import time

from prometheus_client import Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import METHODS, unforeseen
from service.logs import about

REQUEST_ID = "X-Request-ID"
_SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")
CUT_OFF = 499
"""Status, for the metric alone, of a request that got no answer: it was cut off (nginx's number for that)."""


class EveryRequest:
    """Middleware around all the others.

    ``seconds`` has the labels method, route and status. A route is its template: raw paths are without number, and so
    are the methods that clients can think of.
    """

    def __init__(self, app: ASGIApp, seconds: Histogram) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID, "")
        if not _SANE.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        started, status = time.perf_counter(), None

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with about(request_id=request_id):
            try:
                await self._app(scope, receive, send_on)
            except Exception as error:
                if status is not None:  # too late for another answer
                    raise
                await unforeseen(Request(scope), error)(scope, receive, send_on)
            finally:
                method = scope["method"] if scope["method"] in METHODS else "other"
                seconds = time.perf_counter() - started
                self._seconds.labels(method, route_of(scope), str(status or CUT_OFF)).observe(seconds)


def route_of(scope: Scope) -> str:
    """The template of the route that a request took, ``unmatched`` if it took none."""
    return str(getattr(scope.get("route"), "path", "unmatched"))
