"""Whom a service without API keys answers: its own machine, and of what runs there not the pages of other sites.

The socket a server listens on cannot be seen from here, and it may be a container's; so every request is judged by
the two ends of its connection. With keys nothing of this matters: no browser sends one by itself.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import Request

from service.addresses import can_be_rebound, host_of, is_loopback
from service.jobs.errors import HostRefusedError, KeysRequiredError, OriginRefusedError
from service.settings import Settings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing; what they answer, a browser keeps from pages of other sites."""

_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")
"""What proxies add: a stranger's request arrives from this machine if the proxy is on it."""


def check_keyless(request: Request, settings: Settings) -> None:
    """Whether a request without a key may be answered while there are no keys.

    Raises:
        KeysRequiredError: it comes from elsewhere, and the service is not open to all.
        HostRefusedError: it calls this server by a name that may be someone else's.
        OriginRefusedError: a page of another site sent it, to change something.
    """
    if not settings.open and not _is_local(request, settings):
        raise KeysRequiredError(
            "This service has no API keys, and so answers requests from its own machine alone.",
            "Its operator makes the first key with `aquant keys create NAME --owner OWNER`, or sets AQUANT_OPEN=true "
            "to let everybody in who can reach it.",
        )
    header = request.headers.get("host", "")
    host = host_of(header)
    names = {name.strip().lower() for name in settings.hosts.split(",")}
    if header and (host is None or (can_be_rebound(host) and host not in names)):
        raise HostRefusedError(
            f"Without API keys, this service does not answer to the name {header!r}.",
            "Call it by its address or as localhost, or have the operator add the name to AQUANT_HOSTS.",
        )
    if request.method not in SAFE_METHODS and not _is_same_origin(request, header):
        raise OriginRefusedError(
            f"A page of another site ({request.headers.get('origin', 'unnamed')!r}) sent this request.",
            "Send it from a page of this service, or from a program. Pages elsewhere need an API key, and a server.",
        )


def check_own_page(request: Request) -> None:
    """Whether a request to change something comes from a page of this service: for routes that a cookie opens.

    A browser says so of every such request, so one that says nothing is refused as well.

    Raises:
        OriginRefusedError: it does not.
    """
    said = any(name in request.headers for name in ("sec-fetch-site", "origin"))
    if not said or not _is_same_origin(request, request.headers.get("host", "")):
        raise OriginRefusedError(
            f"A page of another site ({request.headers.get('origin', 'unnamed')!r}) sent this request.",
            "Send it from the page itself. Programs use the API, with a key.",
        )


def _is_local(request: Request, settings: Settings) -> bool:
    if any(name in request.headers for name in _FORWARDED):
        return False
    if settings.published_on is not None:  # both ends are the container network's, wherever a request comes from
        return is_loopback(settings.published_on)
    ends = (request.scope.get("client"), request.scope.get("server"))
    return all(end is not None and is_loopback(end[0]) for end in ends)


def _is_same_origin(request: Request, host: str) -> bool:
    """What the browser says of the page; programs say nothing."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    try:
        # Without the scheme: a proxy in front may have taken the TLS off.
        return origin is None or urlsplit(origin).netloc == host
    except ValueError:
        return False
