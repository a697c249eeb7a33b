"""Hosts and addresses, as headers and sockets have them."""

from __future__ import annotations

import pytest

from service.addresses import can_be_rebound, host_of, is_loopback, neighbourhood


@pytest.mark.parametrize(
    ("host", "loopback", "rebound"),
    [
        ("127.0.0.1", True, False),
        ("127.8.9.10", True, False),
        ("::1", True, False),
        ("::ffff:127.0.0.1", True, False),
        ("localhost", True, False),
        ("aquant.localhost", True, False),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("192.168.0.7", False, False),
        ("::ffff:192.168.0.7", False, False),
        ("localhost.example.org", False, True),
        ("127.0.0.1.example.org", False, True),
        ("notlocalhost", False, True),
        ("2130706433", False, True),  # 127.0.0.1 to a browser, which sends it as that
        ("", False, True),
    ],
)
def test_a_host_is_told_from_one_that_only_looks_like_it(host: str, loopback: bool, rebound: bool) -> None:
    assert is_loopback(host) is loopback
    assert can_be_rebound(host) is rebound


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("LocalHost", "localhost"),
        ("evil.example.org:80", "evil.example.org"),
        ("localhost:8000@evil.example.org", "evil.example.org"),
        ("[::1", None),
        ("", None),
    ],
)
def test_a_host_header_is_read_as_a_host(header: str, host: str | None) -> None:
    assert host_of(header) == host


def test_addresses_of_one_customer_count_as_one_client() -> None:
    assert neighbourhood("2001:db8:1:2:3::4") == neighbourhood("2001:db8:1:2:ffff::1") == "2001:db8:1:2::/64"
    assert neighbourhood("2001:db8:1:3::4") != neighbourhood("2001:db8:1:2::4")
    assert neighbourhood("192.0.2.1") == neighbourhood("::ffff:192.0.2.1") == "192.0.2.1"
    assert neighbourhood("unknown") == "unknown"
