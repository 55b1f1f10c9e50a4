"""The span of one request at a front door, from when it came to when it was answered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from saga.model import Saga
from saga.tracing import (
    Attribute,
    Span,
    TraceContext,
    Tracer,
    parent_of,
    read_traceparent,
    read_tracestate,
    trace_id_of,
)


class RequestSpan:
    """Below the caller's span; without one, the first of a trace of its own, or of the saga that the request starts."""

    def __init__(self, tracer: Tracer, traceparent: str | None, tracestate: str | None) -> None:
        self._tracer = tracer
        self._caller = read_traceparent(traceparent)
        self._tracestate = None if self._caller is None else read_tracestate(tracestate)
        self._started_at = datetime.now(UTC)
        self._trace_id = os.urandom(16).hex() if self._caller is None else self._caller.trace_id
        self.span_id = os.urandom(8).hex()

    def joins(self, saga: Saga) -> None:
        """The request has started this saga, unless another one had."""
        if parent_of(saga) == self.span_id:
            self._trace_id = trace_id_of(saga)

    def end(self, name: str, seconds: float, attributes: Mapping[str, Attribute], error: str | None) -> None:
        self._tracer.keep(
            Span(
                name=name,
                kind="server",
                context=TraceContext(
                    trace_id=self._trace_id,
                    span_id=self.span_id,
                    sampled=self._caller is None or self._caller.sampled,
                ),
                parent=None if self._caller is None else self._caller.span_id,
                started_at=self._started_at,
                ended_at=self._started_at + timedelta(seconds=seconds),
                attributes=attributes,
                tracestate=self._tracestate,
                error=error,
            )
        )
