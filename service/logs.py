"""How the processes log: as text for people or as JSON lines for machines, and what each line is about.

What a line is about (job, attempt, request) is not written at every call: :func:`about` notes it in a context
variable, and a filter of the handler puts it on every record, whoever logs. A thread begins with an empty context,
so one that works for a job is started within a copy of its starter's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from opentelemetry import trace
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from service.settings import Settings

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
JSON = ("timestamp", "levelname", "name", "message")

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default=MappingProxyType({}))


@contextmanager
def about(**fields: str | int | None) -> Iterator[None]:
    """Whatever is logged inside is about this: ``job_id``, ``attempt``, ``request_id``; None says nothing."""
    token = _about.set({**_about.get(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


def what_about() -> Mapping[str, Any]:
    """What is logged here and now is about."""
    return _about.get()


def set_up_logging(settings: Settings) -> None:
    """Log to standard error in the format that was chosen; does nothing where the process already logs."""
    if logging.root.handlers:
        return
    handler = logging.StreamHandler()
    handler.addFilter(_add_fields)
    if settings.log_format == "json":
        names = {"levelname": "level", "name": "logger"}
        reserved = [*RESERVED_ATTRS, "color_message"]  # uvicorn's, the same again with colours
        handler.setFormatter(JsonFormatter(JSON, rename_fields=names, timestamp=True, reserved_attrs=reserved))
        logging.captureWarnings(True)
        for server in map(logging.getLogger, ("uvicorn", "uvicorn.access")):
            if server.handlers:  # it has set up its own text by now; without, it was told to be silent
                server.handlers.clear()
                server.propagate = True
    else:
        handler.setFormatter(logging.Formatter(TEXT))
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _add_fields(record: logging.LogRecord) -> bool:
    record.__dict__.update(_about.get())
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        record.trace_id = trace.format_trace_id(span.trace_id)
    return True
