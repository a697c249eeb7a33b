"""Webhooks: what address and secret are taken, how a message is signed, and which messages are due.

Signatures are those of Standard Webhooks (standardwebhooks.com): HMAC-SHA256 over id, timestamp and body.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.jobs.errors import WebhookRefusedError
from service.jobs.records import JobRecord, WebhookRecord
from service.jobs.repository import now
from service.jobs.rows import changed
from service.jobs.schemas import WebhookRequest
from service.jobs.states import FINISHED

Networks = Sequence[IPv4Network | IPv6Network]

RETRY_AFTER = tuple(timedelta(seconds=seconds) for seconds in (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600))
"""How long to wait after each try that came to nothing; after the last there is no other."""

MAX_URL = 2048
SECRET_PREFIX = "whsec_"
SECRET_BYTES = range(24, 65)


def new_webhook(request: WebhookRequest, allow: Networks) -> WebhookRecord:
    """A webhook for a job that is being submitted.

    Raises:
        WebhookRefusedError: its address or its secret is not one that is used. Names are resolved when there is
            something to send, not here.
    """
    remedy = "Give an https URL of a public address, without credentials in it."
    try:
        url = urlsplit(request.url)
        port = url.port
    except ValueError as error:
        raise WebhookRefusedError(f"The webhook's URL cannot be read: {error}.", remedy) from None
    if url.scheme != "https" or not url.hostname or port == 0:
        raise WebhookRefusedError(f"The webhook {request.url!r} is not an https URL.", remedy)
    if url.username is not None or url.password is not None:
        raise WebhookRefusedError("The webhook's URL has a user name or password in it.", remedy)
    if len(request.url) > MAX_URL or not request.url.isascii() or not request.url.isprintable() or " " in request.url:
        raise WebhookRefusedError(
            f"The webhook's URL is longer than {MAX_URL} characters, or has others than URLs have.", remedy
        )
    try:
        literal = ip_address(url.hostname)
    except ValueError:
        pass  # a name
    else:
        if not is_allowed(literal, allow):
            raise WebhookRefusedError(f"The webhook's address {literal} is not a public one.", remedy)
    secret_bytes(request.secret)
    return WebhookRecord(
        message_id=f"msg_{secrets.token_hex(12)}", url=request.url, secret=request.secret, due_at=now(), tries=0
    )


def is_allowed(address: IPv4Address | IPv6Address, allow: Networks) -> bool:
    """Whether a message may be sent there: to public addresses, and to networks that the operator admits."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_allowed(address.ipv4_mapped, allow)
        if address.sixtofour is not None and not is_allowed(address.sixtofour, allow):
            return False
    if any(address in network for network in allow):
        return True
    return address.is_global and not address.is_multicast and not address.is_reserved


def secret_bytes(secret: str) -> bytes:
    """The key that a secret stands for.

    Raises:
        WebhookRefusedError: it is not written as secrets are, or too short, or too long.
    """
    encoded = secret.removeprefix(SECRET_PREFIX)
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) not in SECRET_BYTES:
        raise WebhookRefusedError(
            "The webhook's secret is not `whsec_` and the base64 of 24 to 64 bytes.",
            "Make one with: echo whsec_$(openssl rand -base64 32)",
        )
    return key


def sign(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The value of ``webhook-signature``."""
    message = b".".join((message_id.encode(), str(timestamp).encode(), body))
    return f"v1,{base64.b64encode(hmac.digest(secret_bytes(secret), message, hashlib.sha256)).decode()}"


def claim_due(session: Session, limit: int, hold: timedelta) -> Sequence[JobRecord]:
    """Jobs that have ended and whose webhook is to be tried now, by this caller alone until ``hold`` has passed."""
    at = now()
    query = (
        select(JobRecord)
        .join(WebhookRecord, WebhookRecord.job_id == JobRecord.id)
        .where(WebhookRecord.due_at <= at, JobRecord.state.in_(FINISHED))
        .order_by(WebhookRecord.due_at)
        .limit(limit)
    )
    return [job for job in session.scalars(query).all() if job.webhook and _claim(session, job.webhook, at + hold)]


def _claim(session: Session, webhook: WebhookRecord, until: datetime) -> bool:
    as_read = update(WebhookRecord).where(
        WebhookRecord.job_id == webhook.job_id, WebhookRecord.due_at == webhook.due_at
    )
    return changed(session, as_read.values(due_at=until, tries=WebhookRecord.tries + 1))


def note_delivered(session: Session, job_id: str) -> None:
    """There is nothing more to be sent."""
    session.execute(
        update(WebhookRecord).where(WebhookRecord.job_id == job_id).values(due_at=None, delivered_at=now(), error=None)
    )


def note_failed(session: Session, job_id: str, error: str, again_at: datetime | None) -> None:
    """A try came to nothing; the next is at ``again_at``, if there is to be one."""
    session.execute(
        update(WebhookRecord).where(WebhookRecord.job_id == job_id).values(due_at=again_at, error=error[:300])
    )
