"""Reads a multipart form part by part as it arrives, so that any file passes through in constant memory; or a small
body whole.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Literal

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.jobs.errors import FormError, FormTypeError, UploadTooLargeError
from service.jobs.submission import FORM_REMEDY

DRAIN_BYTES = 32 * 1024 * 1024
"""What is read of a request that is refused, so that its client gets to see why."""

MAX_FILENAME = 120
"""Characters of a file's name that are kept."""


@dataclass(frozen=True)
class _Event:
    kind: Literal["part", "data", "part_end", "form_end"]
    data: bytes = b""
    filename: str | None = None


class Part:
    """One part of the form; its bytes can be read once, before the next part is asked for.

    A part with a file name is a file, one without is a field.

    Attributes:
        filename: what the file is called where it came from: anything a client can make up, without a folder.
    """

    def __init__(self, name: str, filename: str | None, form: FormStream) -> None:
        self.name, self.filename = name, filename
        self._form = form

    async def content(self, limit: int) -> bytes:
        """All of a small part.

        Raises:
            UploadTooLargeError: it has more than ``limit`` bytes.
        """
        return b"".join([chunk async for chunk in self.chunks(limit)])

    async def chunks(self, limit: int) -> AsyncIterator[bytes]:
        """The part's bytes as they arrive.

        Raises:
            UploadTooLargeError: there are more than ``limit``.
        """
        size = 0
        while (event := await self._form.next_event()).kind == "data":
            size += len(event.data)
            if size > limit:
                raise UploadTooLargeError(
                    f"`{self.name}` is larger than the {limit} bytes this service takes.",
                    "Send a smaller one, or ask the operator for a higher limit.",
                )
            yield event.data


class FormStream:
    """A multipart/form-data body."""

    def __init__(self, body: AsyncIterator[bytes], content_type: str | None) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            said = "missing" if content_type is None else repr(content_type)
            raise FormTypeError(f"The content type is {said}, not multipart/form-data.", FORM_REMEDY)
        if b"boundary" not in options:
            raise FormError("The content type names no boundary.", FORM_REMEDY)
        self._body = body
        self._events: deque[_Event] = deque()
        self._header_name, self._header_value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_data,
                    "on_part_end": lambda: self._events.append(_Event("part_end")),
                    "on_end": lambda: self._events.append(_Event("form_end")),
                },
            )
        except FormParserError as error:
            raise FormError(f"The form cannot be read: {error}.", FORM_REMEDY) from error

    async def parts(self) -> AsyncIterator[Part]:
        """The parts in the order they were sent."""
        while (event := await self.next_event()).kind != "form_end":
            if event.kind == "part":
                yield Part(event.data.decode("utf-8", "replace"), event.filename, self)

    async def next_event(self) -> _Event:
        """The next piece of the form."""
        while not self._events:
            try:
                chunk = await anext(self._body)
            except StopAsyncIteration:
                raise FormError("The form ends before its closing boundary: it was cut short.", FORM_REMEDY) from None
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise FormError(f"The form cannot be read: {error}.", FORM_REMEDY) from error
        return self._events.popleft()

    async def drain(self) -> None:
        """Read on without looking, so that a client that still sends gets to see the answer."""
        left = DRAIN_BYTES
        async for chunk in self._body:
            left -= len(chunk)
            if left < 0:
                return

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        filename = options.get(b"filename")
        called = None if filename is None else without_folder(filename.decode("utf-8", "replace"))
        self._events.append(_Event("part", options.get(b"name", b""), called))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(_Event("data", data[start:end]))


async def read_whole(body: AsyncIterable[bytes], limit: int, too_large: UploadTooLargeError) -> bytes:
    """All of a body of at most ``limit`` bytes; of a larger one no more is read than tells that it is.

    Raises:
        UploadTooLargeError: the one given.
    """
    read = b""
    async for chunk in body:
        read += chunk
        if len(read) > limit:
            raise too_large
    return read


def without_folder(filename: str) -> str:
    """The last part of a path of any system, of a length to be shown."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(letter for letter in name if letter.isprintable())[:MAX_FILENAME]
