"""Which webhooks are taken."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from service.jobs.errors import WebhookRefusedError
from service.jobs.schemas import WebhookRequest
from service.jobs.webhooks import is_allowed, new_webhook

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "198.18.0.1", "240.0.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fd00::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::10.0.0.1", "2002:7f00:1::",
        "2002:a00:1::", "2001:db8::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_allowed(ip_address(address), [])


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_allowed(ip_address(address), [])


def test_admitted_networks() -> None:
    allow = [ip_network("10.0.0.0/8"), ip_network("::1/128")]
    assert is_allowed(ip_address("10.1.2.3"), allow)
    assert is_allowed(ip_address("::ffff:10.1.2.3"), allow)
    assert is_allowed(ip_address("::1"), allow)
    assert not is_allowed(ip_address("127.0.0.1"), allow)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "ftp://example.com/", "https://", "https:///x", "example.com", "", "https://user@example.com/",
        "https://:secret@example.com/", "https://127.0.0.1/", "https://[::1]/", "https://169.254.169.254/latest",
        "https://example.com:99999/", "https://example.com:0/", "https://[::1", "https://exa mple.com/",
        "https://example.com/\r\nx", "https://b\u00fccher.example/",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(WebhookRefusedError):
        new_webhook(WebhookRequest(url=url, secret=SECRET), [])


@pytest.mark.parametrize(
    "secret", ["", "secret", "whsec_", "whsec_c2hvcnQ=", "whsec_!!", SECRET.removeprefix("whsec_")]
)
def test_secrets_that_are_refused(secret: str) -> None:
    with pytest.raises(WebhookRefusedError, match="24 to 64 bytes"):
        new_webhook(WebhookRequest(url="https://example.com/", secret=secret), [])


def test_a_webhook_that_is_taken() -> None:
    hook = new_webhook(WebhookRequest(url="https://example.com:8443/x?y=z", secret=SECRET), [])
    assert (hook.url, hook.secret, hook.tries) == ("https://example.com:8443/x?y=z", SECRET, 0)
    assert hook.message_id.startswith("msg_")
