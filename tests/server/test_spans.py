"""The thread that hands spans to a collector: what it may lose, and that nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from saga.tracing import Span, TraceContext
from server.config import Secret
from server.redaction import Mask
from server.spans import BATCH_SPANS, MAX_ERROR_CHARS, OtlpTracer

NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Gate(SpanExporter):
    """Lets batches through when it is open; `result` is what comes of them."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.result = result
        self.open = threading.Event()
        self.reached = threading.Event()
        self.batches: list[list[str]] = []
        self.errors: list[str | None] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.reached.set()
        self.open.wait()
        self.batches.append([span.name for span in spans])
        self.errors += [span.status.description for span in spans]
        return self.result

    def shutdown(self) -> None:
        self.open.set()


def span(name: str, *, sampled: bool = True) -> Span:
    return Span(
        name=name,
        kind="internal",
        context=TraceContext(trace_id="a" * 32, span_id="b" * 16, sampled=sampled),
        parent=None,
        started_at=NOW,
        ended_at=NOW,
        attributes={},
    )


def tracer_on(gate: Gate, queue_spans: int) -> OtlpTracer:
    return OtlpTracer(gate, Resource({}), Mask(), queue_spans=queue_spans)


def test_spans_come_in_order_in_batches_and_those_not_to_be_kept_do_not() -> None:
    gate = Gate()
    tracer = tracer_on(gate, 10_000)
    for number in range(BATCH_SPANS + 10):
        tracer.keep(span(f"{number}"))
        tracer.keep(span("unsampled", sampled=False))
    gate.open.set()
    tracer.close()
    assert [name for batch in gate.batches for name in batch] == [f"{number}" for number in range(BATCH_SPANS + 10)]
    assert max(map(len, gate.batches)) <= BATCH_SPANS
    assert (tracer.exported, tracer.lost) == (BATCH_SPANS + 10, 0)


def test_a_collector_that_hangs_holds_nobody_up_and_costs_what_does_not_fit() -> None:
    gate = Gate()
    tracer = tracer_on(gate, BATCH_SPANS)
    for _ in range(BATCH_SPANS):
        tracer.keep(span("first"))
    assert gate.reached.wait(30)  # that batch is with the collector, which does not answer
    for _ in range(BATCH_SPANS + 5):
        tracer.keep(span("second"))
    assert tracer.lost == 5
    began = time.monotonic()
    tracer.close(0.05)
    assert time.monotonic() - began < 20
    assert tracer.lost >= BATCH_SPANS + 5 - len(gate.batches) * BATCH_SPANS
    tracer.keep(span("too late"))
    assert tracer.lost >= 6


@pytest.mark.parametrize("parent", [None, "no id"])
def test_spans_a_collector_does_not_get_are_counted_and_later_ones_come(
    parent: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(SpanExportResult.FAILURE)
    gate.open.set()
    tracer = tracer_on(gate, 100)
    tracer.keep(msgspec.structs.replace(span("refused, or not to be written down"), parent=parent))
    give_up_at = time.monotonic() + 60
    while not tracer.lost:
        assert time.monotonic() < give_up_at
    gate.result = SpanExportResult.SUCCESS
    tracer.keep(span("taken"))
    tracer.close()
    assert (tracer.exported, tracer.lost) == (1, 1)
    assert "collector_unavailable lost=1" in caplog.text
    assert ("Traceback" in caplog.text) == (parent is not None)


def test_a_secret_at_the_place_where_an_error_is_cut_is_not_cut_in_half_before_it_is_masked() -> None:
    gate = Gate()
    gate.open.set()
    tracer = OtlpTracer(gate, Resource({}), Mask([Secret("hunter2-and-more")]))
    tracer.keep(msgspec.structs.replace(span("failed"), error=f"{'x' * (MAX_ERROR_CHARS - 8)} hunter2-and-more y"))
    tracer.close()
    (told,) = gate.errors
    assert told is not None
    assert (told[-7:], "hunter2" in told, len(told)) == ("x *** y", False, MAX_ERROR_CHARS - 2)
