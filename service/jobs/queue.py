"""The message queues, one for each device: how API and worker reach the broker, and the one message there is ("job X
waits": whose turn it is, the rows say).

The settings follow from experiments: a task that outlives the visibility timeout is delivered twice, and a
worker that prefetches redelivers what it holds without end. Hence a visibility timeout above the job's time
limit, late acknowledgement, no prefetching; and since every message may arrive twice or never, the database
row decides.
"""

from __future__ import annotations

from collections.abc import Collection

from celery import Celery
from kombu.exceptions import OperationalError

from service.jobs.states import Device
from service.settings import Settings

RUN_JOB = "aquant.run_job"
"""Name of the worker's task; its argument is the job's id."""

CONNECT_SECONDS = 3.0


class BrokerUnknownError(ValueError):
    """The settings name no broker."""


class QueueDownError(Exception):
    """The broker cannot be reached."""


def make_celery(settings: Settings) -> Celery:
    """The Celery app of both sides.

    Raises:
        BrokerUnknownError: the settings do not say where the broker is.
    """
    if settings.broker_url is None:
        raise BrokerUnknownError(
            "No broker is configured. Set AQUANT_BROKER_URL (redis://host:port/0), or start the whole stack "
            "with `aquant up`, which brings its own."
        )
    hard_limit = settings.job_seconds + 600  # the worker ends a job itself; this is for one that hangs
    app = Celery("aquant")
    app.conf.update(
        broker_url=settings.broker_url,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "visibility_timeout": hard_limit + 3600,
            "socket_keepalive": True,
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_timeout": 30.0,
            "health_check_interval": 25,
            # How a send meets an absent broker: one more try, at once; the reaper sends again later.
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.1,
        },
        task_default_queue=settings.queue_name,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_time_limit=hard_limit,
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_pool="prefork",
        worker_pool_start_method="spawn",  # CUDA cannot be forked
        worker_concurrency=1,
        worker_hijack_root_logger=False,
        worker_soft_shutdown_timeout=3.0,
        worker_cancel_long_running_tasks_on_connection_loss=False,
    )
    return app


def queue_of(settings: Settings, device: Device) -> str:
    """The queue that workers on this device listen to."""
    return f"{settings.queue_name}.{device}"


class JobQueue:
    """The API's side of the queues."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app = make_celery(settings)

    def announce(self, job_id: str, devices: Collection[Device]) -> None:
        """Tell the workers on each of these devices that a job waits.

        Raises:
            QueueDownError: the broker cannot be reached.
        """
        try:
            for device in devices:
                self._app.send_task(RUN_JOB, args=[job_id], queue=queue_of(self._settings, device))
        except (OperationalError, OSError) as error:
            raise QueueDownError(f"The broker cannot be reached: {error}") from error

    def depth(self, device: Device) -> int:
        """Number of messages that wait for workers on this device; also the check that the broker answers.

        Raises:
            QueueDownError: the broker cannot be reached.
        """
        try:
            with self._app.connection_for_read() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0.1)
                client = connection.default_channel.client
                return int(client.llen(queue_of(self._settings, device)))
        except (OperationalError, OSError) as error:
            raise QueueDownError(f"The broker cannot be reached: {error}") from error

    def close(self) -> None:
        """Give the connections back."""
        self._app.close()
