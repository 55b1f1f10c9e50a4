"""Spans to an OpenTelemetry collector, over HTTP. Needs the extra `otel`; imported only where it is configured.

`keep` puts a span into a bounded queue, whatever thread it is called from; one thread of our own takes batches out of
it, and it alone waits for the collector. A collector that is away costs the spans that found the queue full, which are
counted, and nothing else. The library's batch processor does the same but does not tell what it lost.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from datetime import datetime
from itertools import islice

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from saga.tracing import Span, Tracer
from server.redaction import Mask

log = logging.getLogger("saga.tracing")

QUEUE_SPANS = 16_384
"""What may wait: some seconds of a busy worker, some MB."""
BATCH_SPANS = 512
"""As the batch processor of OpenTelemetry has it."""
BATCH_SECS = 1.0
"""How long a span waits for others, and so about what a crash can lose."""
LAST_SECS = 3.0
"""How long the end of the process waits for the collector."""
MAX_ERROR_CHARS = 500
"""Of what a participant says, in a span: its whole text is in the step log. A guess."""

TRACES_PATH = "/v1/traces"
_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}


class OtlpTracer(Tracer):
    """Hands spans to `exporter`. `exported` and `lost` count them; those that wait are in neither. What participants
    say goes through `mask` before it leaves the house."""

    enabled = True

    def __init__(
        self, exporter: SpanExporter, resource: Resource, mask: Mask, *, queue_spans: int = QUEUE_SPANS
    ) -> None:
        self._exporter = exporter
        self._mask = mask
        self._resource = resource
        self._scope = InstrumentationScope("saga")
        self._queue: deque[Span] = deque()
        self._queue_spans = queue_spans
        self._more = threading.Event()
        self._ends_at = float("inf")
        self._failing = False
        self.exported = 0
        self._refused = 0
        self._failed = 0
        # A daemon: a collector that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        return self._refused + self._failed  # each has one writer

    def keep(self, span: Span) -> None:
        if not span.context.sampled:
            return
        if len(self._queue) >= self._queue_spans or self._ends_at != float("inf"):
            self._refused += 1
            return
        self._queue.append(span)
        if len(self._queue) >= BATCH_SPANS:
            self._more.set()

    def close(self, secs: float = LAST_SECS) -> None:
        """Sends what waits, for up to `secs`; the rest is lost."""
        self._ends_at = time.monotonic() + secs
        self._more.set()
        self._thread.join(secs)
        if self._thread.is_alive():
            self._exporter.shutdown()  # ends its pause between two tries
            self._thread.join(0.2)
        waiting = len(self._queue)
        self._refused += waiting
        if self.lost:
            log.warning("spans_lost count=%d", self.lost)

    def _run(self) -> None:
        while self._ends_at == float("inf"):
            self._more.wait(BATCH_SECS)
            self._more.clear()
            while self._queue and time.monotonic() < self._ends_at:
                self.export_once()
        while self._queue and time.monotonic() < self._ends_at:
            self.export_once()

    def export_once(self) -> None:
        """One batch to the collector; returns when it has it, or will not have it."""
        batch = list(islice(iter(self._queue.popleft, None), min(len(self._queue), BATCH_SPANS)))
        try:
            result = self._exporter.export([self._readable(span) for span in batch])
        except Exception:  # a span that cannot be told must not end the thread, and with it all later spans
            log.exception("spans_not_exported")
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self.exported += len(batch)
        else:
            self._failed += len(batch)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            log.warning("collector_unavailable lost=%d", self.lost)
        elif self._failing and not failing:
            log.info("collector_back lost=%d", self.lost)
        self._failing = failing

    def _readable(self, span: Span) -> ReadableSpan:
        state = None if span.tracestate is None else TraceState.from_header([span.tracestate])
        trace_id = int(span.context.trace_id, 16)
        flags = TraceFlags(TraceFlags.SAMPLED)
        return ReadableSpan(
            name=span.name,
            context=SpanContext(trace_id, int(span.context.span_id, 16), False, flags, state),
            parent=None if span.parent is None else SpanContext(trace_id, int(span.parent, 16), True, flags, state),
            resource=self._resource,
            attributes=span.attributes,
            kind=_KINDS[span.kind],
            status=self._status(span.error),
            start_time=_nanoseconds(span.started_at),
            end_time=_nanoseconds(span.ended_at),
            instrumentation_scope=self._scope,
        )

    def _status(self, error: str | None) -> Status:
        if error is None:
            return Status(StatusCode.UNSET)
        return Status(StatusCode.ERROR, self._mask(error)[:MAX_ERROR_CHARS])  # half a secret would not be known for one


def _nanoseconds(instant: datetime) -> int:
    return int(instant.timestamp() * 1_000_000) * 1_000


def otlp_tracer(endpoint: str, mask: Mask, *, name: str, version: str, environment: str, worker_id: str) -> OtlpTracer:
    """A tracer for the collector at `endpoint`. What else there is to say about it comes from OpenTelemetry's own
    environment variables: OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT, _CERTIFICATE, _COMPRESSION, OTEL_RESOURCE_ATTRIBUTES,
    OTEL_SERVICE_NAME."""
    # Of a collector that is away it would say each try; what we have to say about it are our own lines.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or name,
            "service.version": version,
            "service.instance.id": worker_id,
            "deployment.environment.name": environment,
        }
    )
    return OtlpTracer(OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES_PATH), resource, mask)
