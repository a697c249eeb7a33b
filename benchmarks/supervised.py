"""A stack whose parts are started again when they die, as an operator's supervisor does, on loopback alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from service.local import api_command, broker_command, environment_of, free_port
from service.local_components import Component, start_component, stop_component
from service.settings import Settings

LOOK_SECONDS = 0.2


@dataclass
class Part:
    """One part of the stack, whichever process plays it now."""

    name: str
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    component: Component | None = None
    starts: int = 0

    def ensure(self) -> None:
        """Starts it, unless it runs."""
        if self.component is None or self.component.process.poll() is not None:
            if self.component is not None:
                stop_component(self.component)  # what it left of its session
            self.component = start_component(self.name, self.argv, self.log, "", self.environment)
            self.starts += 1

    def family(self) -> list[psutil.Process]:
        """Its process, then all descendants."""
        if self.component is None:
            return []
        try:
            process = psutil.Process(self.component.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@dataclass
class SupervisedStack:
    """Broker, API and workers; a thread starts anew what has died."""

    settings: Settings
    url: str
    parts: dict[str, Part]
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def workers(self) -> list[Part]:
        return [part for name, part in self.parts.items() if name.startswith("worker")]

    def run(self) -> None:
        """Until ``end``; the thread that starts a part has to outlive it."""
        while not self._done.wait(LOOK_SECONDS):
            for part in list(self.parts.values()):
                part.ensure()
        for part in reversed(list(self.parts.values())):
            if part.component is not None:
                stop_component(part.component)

    def end(self) -> None:
        """Has every part stopped."""
        self._done.set()

    def until_ready(self, seconds: float = 120) -> None:
        """Waits until the API answers and all workers have signed in.

        Raises:
            TimeoutError: they did not.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                answer = httpx.get(f"{self.url}/health/ready", timeout=5)
                if answer.is_success and sum(w["alive"] for w in answer.json()["workers"]) >= len(self.workers):
                    return
            time.sleep(LOOK_SECONDS)
        raise TimeoutError(f"the stack was not ready within {seconds:.0f} s; see {self.settings.data_dir / 'logs'}")


@contextmanager
def supervised(settings: Settings, workers: Sequence[Sequence[str]]) -> Iterator[SupervisedStack]:
    """Starts the stack and waits for it; at the end no process of it is left.

    Args:
        settings: ``data_dir`` and what else is set otherwise; addresses are chosen here.
        workers: the command of each.
    """
    data = settings.data_dir.resolve()
    logs = data / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    broker_port, api_port = free_port("127.0.0.1"), free_port("127.0.0.1")
    settings = settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{broker_port}/0", "port": api_port})
    assert settings.broker_url is not None
    environment = environment_of(settings, settings.broker_url, api_port)
    commands = {
        "broker": broker_command(broker_port, data / "broker"),
        "api": api_command("127.0.0.1", api_port),
        **{f"worker {number}": list(command) for number, command in enumerate(workers)},
    }
    parts = {name: Part(name, argv, logs / f"{name}.log", environment) for name, argv in commands.items()}
    stack = SupervisedStack(settings, f"http://127.0.0.1:{api_port}", parts)
    thread = threading.Thread(target=stack.run, name="supervisor")
    thread.start()
    try:
        stack.until_ready()
        yield stack
    finally:
        stack.end()
        thread.join()
