"""An attempt's reports become spans, one in the other, and durations of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracerProvider, Tracer

from aquant_core.progress import Progress
from worker.steps import BlockEnd, Steps

Blocks = list[BlockEnd]
RUN = [
    Progress("capture"),
    Progress("forecast", blocks=2, method="aquant"),
    Progress("forecast", blocks=2, method="qdrop"),
    Progress("reconstruct", 1, 2, 1, 20, 0.9, method="aquant"),
    Progress("reconstruct", 1, 2, 20, 20, 0.5, method="aquant"),
    Progress("reconstruct", 1, 2, 1, 20, 0.8, method="qdrop"),
    Progress("reconstruct", 2, 2, 1, 20, 0.7, method="aquant"),
    Progress("evaluate", blocks=2, method="aquant"),
    Progress("save"),
]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Tracer]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider.get_tracer("test")
    provider.shutdown()


@pytest.fixture(autouse=True)
def _nothing_is_ended_twice(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert caplog.get_records("call") == []  # OpenTelemetry warns, but does not raise


def go_through(tracer: Tracer, reports: list[Progress], error: type[Exception] | None = None) -> Blocks:
    blocks: Blocks = []
    with tracer.start_as_current_span("attempt", record_exception=False), Steps(
        tracer, blocks.append
    ) as steps:  # fmt: skip
        for report in reports:
            steps.see(report)
        if error is not None:
            raise error
    return blocks


def children(spans: tuple[ReadableSpan, ...], parent: str) -> list[ReadableSpan]:
    (above,) = (span for span in spans if span.name == parent)
    inner = [span for span in spans if span.parent is not None and span.parent.span_id == above.context.span_id]
    return sorted(inner, key=lambda span: span.start_time or 0)


def test_stages_are_in_the_attempt_and_blocks_in_their_stage(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    blocks = go_through(tracer, RUN)
    spans = exporter.get_finished_spans()
    assert len({span.context.span_id for span in spans}) == len(spans)
    stages = children(spans, "attempt")
    assert [span.name for span in stages] == ["intake", "capture", "forecast", "reconstruct", "evaluate", "save"]
    for one, following in pairwise(stages):
        assert one.end_time is not None
        assert following.start_time is not None
        assert one.end_time <= following.start_time
    found = children(spans, "reconstruct")
    assert [dict(span.attributes or {}) for span in found] == [
        {"aquant.method": "aquant", "aquant.block": 1, "aquant.iteration": 20, "aquant.loss": 0.5},
        {"aquant.method": "qdrop", "aquant.block": 1, "aquant.iteration": 1, "aquant.loss": 0.8},
        {"aquant.method": "aquant", "aquant.block": 2, "aquant.iteration": 1, "aquant.loss": 0.7},
    ]
    assert [(end.method, end.block, end.blocks, end.loss) for end in blocks] == [
        ("aquant", 1, 2, 0.5),
        ("qdrop", 1, 2, 0.8),
        ("aquant", 2, 2, 0.7),
    ]
    assert [end.seconds for end in blocks] == pytest.approx(
        [((span.end_time or 0) - (span.start_time or 0)) / 1e9 for span in found], abs=0.05
    )


def test_what_is_cut_off_has_spans_that_end_and_no_duration(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    blocks: Blocks = []
    with pytest.raises(ZeroDivisionError):
        blocks = go_through(tracer, RUN[:5], ZeroDivisionError)
    assert blocks == []
    names = [span.name for span in exporter.get_finished_spans()]
    assert sorted(names) == ["attempt", "block", "capture", "forecast", "intake", "reconstruct"]


def test_blocks_are_timed_without_traces() -> None:
    assert [end.method for end in go_through(NoOpTracerProvider().get_tracer("test"), RUN)] == [
        "aquant",
        "qdrop",
        "aquant",
    ]
