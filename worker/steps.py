"""Follows an attempt by its progress reports through stages and blocks: a span for each, and a block's duration.

The core only reports where it is. A step therefore begins with its first report and ends with the first one of
another; a block's first report comes after its first iteration, so that the time in which the next block's target is
made counts for the block before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from opentelemetry import trace
from opentelemetry.trace import Span, Tracer

from aquant_core.progress import Progress


@dataclass(frozen=True)
class BlockEnd:
    """A block that was gone through to its end.

    Attributes:
        method: the method it was reconstructed by.
        block: its number, from 1.
        blocks: how many there are.
        loss: reconstruction loss of its last step.
        seconds: how long it took.
    """

    method: str
    block: int
    blocks: int
    loss: float | None
    seconds: float


class Steps:
    """The steps of one attempt, within the span that is the current one when it begins; it begins in the intake.

    ``on_block`` is told of every block that was gone through to its end.
    """

    def __init__(self, tracer: Tracer, on_block: Callable[[BlockEnd], None]) -> None:
        self._tracer, self._on_block = tracer, on_block
        self._stage = "intake"
        self._block: tuple[str | None, int] | None = None
        self._block_began = 0.0
        self._latest: Progress | None = None
        self._attempt: Span = trace.INVALID_SPAN
        self._stage_span: Span = trace.INVALID_SPAN
        self._block_span: Span = trace.INVALID_SPAN

    def __enter__(self) -> Self:
        self._attempt = trace.get_current_span()
        self._stage_span = self._begin(self._stage, self._attempt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._block is not None:
            self._block_span.end()  # cut off, so its duration says nothing
        self._stage_span.end()

    def see(self, progress: Progress) -> None:
        """Note where the work is now."""
        block = (progress.method, progress.block) if progress.block else None
        if block != self._block:
            self._end_block()
        if progress.stage != self._stage:
            self._stage_span.end()
            self._stage, self._stage_span = progress.stage, self._begin(progress.stage, self._attempt)
        if block is None:
            return
        if block != self._block:
            self._block, self._block_began = block, time.monotonic()
            self._block_span = self._begin("block", self._stage_span)
            self._block_span.set_attributes({"aquant.method": progress.method or "", "aquant.block": progress.block})
        self._latest = progress
        if progress.loss is not None:
            self._block_span.set_attributes({"aquant.iteration": progress.iteration, "aquant.loss": progress.loss})

    def _end_block(self) -> None:
        if self._block is None or self._latest is None:
            return
        self._block_span.end()
        last = self._latest
        seconds = time.monotonic() - self._block_began
        self._on_block(BlockEnd(last.method or "", last.block, last.blocks, last.loss, seconds))
        self._block = None

    def _begin(self, name: str, parent: Span) -> Span:
        return self._tracer.start_span(name, trace.set_span_in_context(parent))
