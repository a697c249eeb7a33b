"""A TCP proxy on loopback that breaks connections where it is told to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Cut:
    """Break the first connection on which, after a request that has ``seen`` in it, so many bytes went this way."""

    way: Literal["up", "down"]
    seen: bytes
    after: int = 0


@dataclass
class CuttingProxy:
    """The proxy; ``cuts`` are those that are still to come."""

    url: str
    cuts: list[Cut] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    """The first line of every request that began with a packet of its own."""


class _Connection:
    def __init__(self, proxy: CuttingProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._cut: Cut | None = None
        self._counted = 0
        self._lock = threading.Lock()

    def pump(self, way: Literal["up", "down"]) -> None:
        source, sink = (self._client, self._server) if way == "up" else (self._server, self._client)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                allowed = self._allowed(way, data)
                sink.sendall(data[:allowed])
                if allowed < len(data):
                    self._break()
                    return
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _allowed(self, way: str, data: bytes) -> int:
        """How many of the bytes may pass."""
        with self._lock:
            if way == "up" and data.split(b" ")[0] in (b"GET", b"PUT", b"POST", b"DELETE", b"HEAD"):
                self._proxy.requests.append(data.split(b"\r\n")[0])
                found = next((cut for cut in self._proxy.cuts if cut.seen in data), None)
                if found is not None:
                    self._proxy.cuts.remove(found)
                    self._cut, self._counted = found, 0
            if self._cut is None or self._cut.way != way:
                return len(data)
            left = self._cut.after - self._counted
            self._counted += len(data)
            return min(left, len(data))

    def _break(self) -> None:
        """The server keeps what it has got; the client's connection is reset."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RD)  # wakes the other thread, without which nothing is reset
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client.close()


@contextlib.contextmanager
def cutting_proxy(port: int) -> Iterator[CuttingProxy]:
    """A proxy before this port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = CuttingProxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
        threads: list[threading.Thread] = []
        sockets: list[socket.socket] = []

        def start(function: Callable[..., None], *arguments: str) -> None:
            threads.append(threading.Thread(target=function, args=arguments))
            threads[-1].start()

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client = listener.accept()[0]
                    server = socket.create_connection(("127.0.0.1", port))
                    sockets.extend((client, server))
                    connection = _Connection(proxy, client, server)
                    start(connection.pump, "up")
                    start(connection.pump, "down")

        start(accept)
        yield proxy
        listener.shutdown(socket.SHUT_RDWR)
        threads[0].join()
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads[1:]:
            thread.join()
        for end in sockets:
            end.close()
