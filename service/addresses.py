"""What an address says of where a request comes from, and whom it asks for."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

IPV6_NEIGHBOURS = 64
"""Bits of an IPv6 address that one customer's addresses share; the rest is theirs to choose."""


def is_loopback(host: str) -> bool:
    """Whether a host, an address or a name that never leaves the machine, is this machine to itself."""
    address = _address(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback


def host_of(header: str) -> str | None:
    """The name or address in a Host header, in lower case and without its port; None where it makes no sense."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def can_be_rebound(host: str) -> bool:
    """Whether someone else may have made this host's name point here.

    A page's own name can be made to resolve to any address after the page is loaded (DNS rebinding), and the browser
    then takes the service for the page's own server. An address cannot, nor can the names of the machine itself.
    """
    return _address(host) is None and not is_loopback(host)


def neighbourhood(client: str) -> str:
    """What counts as one client where an address is all that is known of it."""
    address = _address(client)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, IPV6_NEIGHBOURS), strict=False))
    return str(address or client)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
