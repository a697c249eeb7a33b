"""A collector of traces: takes what OpenTelemetry's exporter sends over HTTP, and keeps the spans."""

from __future__ import annotations

import gzip
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """A span as it was received; ids in hex, ``parent`` empty for a root."""

    name: str
    service: str
    trace: str
    id: str
    parent: str
    failed: bool
    start: int
    end: int
    attributes: dict[str, Any]


@dataclass
class Receiver:
    """Where it listens, and what has come."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)

    def wait(self, found: Callable[[list[Span]], bool], seconds: float = 30) -> list[Span]:
        """The spans, once they are as asked for."""
        deadline = time.monotonic() + seconds
        while not found(self.spans):
            assert time.monotonic() < deadline, f"only these spans came: {sorted({span.name for span in self.spans})}"
            time.sleep(0.05)
        return list(self.spans)

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _attributes(resource.resource.attributes)["service.name"]
            self.spans += [
                Span(
                    one.name,
                    service,
                    one.trace_id.hex(),
                    one.span_id.hex(),
                    one.parent_span_id.hex(),
                    one.status.code == one.status.STATUS_CODE_ERROR,
                    one.start_time_unix_nano,
                    one.end_time_unix_nano,
                    _attributes(one.attributes),
                )
                for scope in resource.scope_spans
                for one in scope.spans
            ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def otlp_receiver() -> Iterator[Receiver]:
    """Listens on a free port of this machine."""
    receiver = Receiver()

    class Taker(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                receiver.take(body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Taker) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
