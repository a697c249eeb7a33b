"""The worker's Celery app (`celery -A worker.celery_app worker`): one spawned child, no torch here."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from billiard import active_children
from celery.signals import celeryd_init, setup_logging, worker_init, worker_process_init, worker_ready, worker_shutdown
from celery.utils.log import get_multiprocessing_logger

from service.artifacts import ArtifactsDownError, open_artifacts
from service.jobs.database import DatabaseUnusableError, UnsupportedDatabaseError, migrate
from service.jobs.queue import make_celery, queue_of
from service.logs import set_up_logging
from service.s3 import UnsupportedStoreError
from service.settings import Settings
from service.tracing import require
from worker.lease import told_to_end
from worker.presence import Presence
from worker.probe import NO_GPU, NoUsableGpuError, find_device
from worker.workplace import clear_abandoned

log = logging.getLogger(__name__)

# The spawned child inherits it before torch starts its threads: on cores shared with the API and the broker,
# OpenMP threads that spin while they wait cost more than the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings = Settings()
require(settings)  # or the child would fail at its first job
app = make_celery(settings)
app.conf.include = ["worker.tasks"]

END = signal.SIGUSR2
"""What a child is told by that its worker ends."""

_presence: Presence | None = None


def _set_up_logging(**_: Any) -> None:
    set_up_logging(settings)
    get_multiprocessing_logger().propagate = True  # it tells of children that were killed


def _choose_device(**_: Any) -> None:
    """In the parent, before Celery asks which queue to listen to; the child is told by its environment."""
    global _presence
    try:
        found = find_device(settings)
    except NoUsableGpuError as error:
        raise SystemExit(str(error)) from error
    log.log(logging.WARNING if NO_GPU in found.detail else logging.INFO, "jobs run on: %s", found.detail)
    os.environ["AQUANT_DEVICE"] = "cuda" if found.device == "gpu" else "cpu"
    app.conf.task_default_queue = queue_of(settings, found.device)
    _presence = Presence(settings, found)


def _prepare(**_: Any) -> None:
    try:
        open_artifacts(settings.artifacts).check()
        migrate(settings)
    except (ArtifactsDownError, UnsupportedStoreError, DatabaseUnusableError, UnsupportedDatabaseError) as error:
        raise SystemExit(str(error)) from error  # of other exceptions Celery makes a line in the log, and goes on


def _appear(**_: Any) -> None:
    assert _presence is not None
    _presence.start()


def _disappear(**_: Any) -> None:
    assert _presence is not None
    _presence.stop()


def _tell_child_first(**_: Any) -> None:
    """Celery keeps it to itself that it was told to end until it ends the child: too late to hand on the job."""

    def told(end: Callable[..., Any]) -> Callable[..., None]:
        def tell_and_end(*event: Any) -> None:
            try:
                for child in active_children():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, END)
            finally:
                end(*event)

        return tell_and_end

    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
        handler = signal.getsignal(number)
        assert callable(handler)
        signal.signal(number, told(handler))


def _await_end() -> None:
    signal.sigwait([END])
    told_to_end.set()


def _begin_child(**_: Any) -> None:
    # By a thread of its own: the one that works may be in a long step of C code, between which no handler runs.
    signal.pthread_sigmask(signal.SIG_BLOCK, [END])
    threading.Thread(target=_await_end, name="end", daemon=True).start()
    # A child that was killed could not clear up after itself; its successor does.
    clear_abandoned(settings.work_dir)


celeryd_init.connect(_set_up_logging)  # before Celery warns of anything
celeryd_init.connect(_choose_device)
setup_logging.connect(_set_up_logging)  # in the child; having a receiver also keeps Celery's own set-up out
worker_init.connect(_prepare)
worker_ready.connect(_appear)
worker_ready.connect(_tell_child_first)
worker_shutdown.connect(_disappear)
worker_process_init.connect(_begin_child)
