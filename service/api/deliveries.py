"""Tells webhooks that their jobs have ended: a task of the API process, with a guard on where its requests go."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address

import httpx
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.api.documents import describe
from service.api.watching import to_its_end
from service.jobs.records import JobRecord, WebhookRecord
from service.jobs.repository import now
from service.jobs.webhooks import (
    RETRY_AFTER,
    Networks,
    claim_due,
    is_allowed,
    note_delivered,
    note_failed,
    sign,
)
from service.logs import about

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
AT_A_TIME = 8
DELIVERY_SECONDS = 15.0
"""All that one try may take, from the name's resolution to the answer's status."""
HOLD = timedelta(seconds=4 * DELIVERY_SECONDS)
"""A try whose process has died in it is made again after this long."""


class DeliveryError(Exception):
    """A try that came to nothing; ``final`` if another would do no better."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Deliveries:
    """Sends what is due. Every message is sent at least once, and bears the same id each time."""

    def __init__(
        self, sessions: sessionmaker[Session], allow: Networks, retry_after: Sequence[timedelta] = RETRY_AFTER
    ) -> None:
        self._sessions, self._allow, self._retry_after = sessions, allow, retry_after
        # Certificates by SSL_CERT_FILE where it is set; no proxy, which would resolve the name a second time; no
        # connection kept, since they are told apart by address alone.
        self._http = httpx.AsyncClient(
            verify=httpx.create_ssl_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=DELIVERY_SECONDS,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def run(self) -> None:
        """Send until the task is cancelled."""
        try:
            while True:
                try:
                    while await self.round():
                        pass
                except SQLAlchemyError as error:
                    log.warning("webhooks wait for the database: %s", error)
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def round(self) -> bool:
        """Try some of what is due; whether there was any."""
        jobs = await to_its_end(self._claim)
        await asyncio.gather(*map(self._deliver, jobs))
        return bool(jobs)

    def _claim(self) -> Sequence[JobRecord]:
        with self._sessions.begin() as session:
            return claim_due(session, AT_A_TIME, HOLD)

    async def _deliver(self, job: JobRecord) -> None:
        webhook = job.webhook
        assert webhook is not None
        with about(job_id=job.id):
            try:
                async with asyncio.timeout(DELIVERY_SECONDS):
                    await self._send(webhook, _message(job))
            except TimeoutError:
                await to_its_end(self._fail, webhook, DeliveryError(f"no answer in {DELIVERY_SECONDS:.0f} s"))
            except DeliveryError as error:
                await to_its_end(self._fail, webhook, error)
            except Exception as error:  # what one message meets must not keep the others
                log.exception("the webhook of job %s met an error nobody foresaw", job.id)
                await to_its_end(self._fail, webhook, DeliveryError(type(error).__name__))
            else:
                await to_its_end(self._succeed, webhook)

    async def _send(self, webhook: WebhookRecord, body: bytes) -> None:
        url = httpx.URL(webhook.url)
        host = url.raw_host.decode("ascii").strip("[]")
        address = await self._resolve(host, url.port or 443)
        timestamp = int(time.time())
        headers = {
            "Host": url.netloc.decode("ascii"),
            "Content-Type": "application/json",
            "User-Agent": "aquant-service",
            "webhook-id": webhook.message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(webhook.secret, webhook.message_id, timestamp, body),
        }
        try:
            # The address that was checked, and no other; the certificate must be the name's.
            async with self._http.stream(
                "POST", url.copy_with(host=address), content=body, headers=headers, extensions={"sni_hostname": host}
            ) as response:
                status = response.status_code
        except httpx.HTTPError as error:
            raise DeliveryError(f"{type(error).__name__}: {error}") from error
        if not 200 <= status < 300:
            raise DeliveryError(f"it answered {status}", final=status == httpx.codes.GONE)

    async def _resolve(self, host: str, port: int) -> str:
        """An address of the host, all of which may be sent to."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise DeliveryError(f"{host} cannot be resolved: {error}") from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not is_allowed(ip_address(address), self._allow):
                raise DeliveryError(f"{host} resolves to {address}, which is not a public address", final=True)
        return addresses[0]

    def _succeed(self, webhook: WebhookRecord) -> None:
        log.info("the webhook of job %s has been told", webhook.job_id)
        with self._sessions.begin() as session:
            note_delivered(session, webhook.job_id)

    def _fail(self, webhook: WebhookRecord, error: DeliveryError) -> None:
        again = None
        if not error.final and webhook.tries < len(self._retry_after):  # `tries` as read: without this one
            again = now() + self._retry_after[webhook.tries]
        log.warning("the webhook of job %s is not told: %s; again: %s", webhook.job_id, error, again or "never")
        with self._sessions.begin() as session:
            note_failed(session, webhook.job_id, str(error), again)


def _message(job: JobRecord) -> bytes:
    document = describe(job).model_dump(mode="json", exclude={"webhook"})
    message = {"type": f"job.{job.state}", "timestamp": document["finished_at"], "data": document}
    return json.dumps(message, separators=(",", ":")).encode()
