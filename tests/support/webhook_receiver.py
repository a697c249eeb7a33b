"""An https server on loopback, with a certificate of an authority of its own, that keeps what it is sent."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme


@dataclass
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """The server; ``answers`` are the statuses it will answer with, and 204 after them."""

    port: int
    authority: Path
    received: list[Received] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    hold: threading.Event | None = None
    """If set, nothing is answered before this event is."""

    def url(self, host: str = "localhost") -> str:
        return f"https://{host}:{self.port}/told?of=jobs"


@contextlib.contextmanager
def receiver(folder: Path) -> Iterator[Receiver]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told.received.append(
                Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            )
            if told.hold is not None:
                told.hold.wait(10)
            self.send_response(told.answers.pop(0) if told.answers else 204)
            self.send_header("location", "https://localhost/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told = Receiver(server.server_address[1], folder / "authority.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield told
        finally:
            if told.hold is not None:
                told.hold.set()
            server.shutdown()
            thread.join()
