"""The trace of a saga: the ids of its spans, and the port through which finished spans are handed out.

All ids are worked out from what is stored: whoever ends an attempt or a saga, a worker that took it over after a crash
too, arrives at the span its participants were told of. A span is handed out whole, when it has ended.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal

import msgspec

from saga.facts import Call
from saga.model import Saga, SagaStatus
from saga.ports import Answer, Outcome
from saga.workflow import Step

_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace_id>(?!0{32})[0-9a-f]{32})-(?P<span_id>(?!0{16})[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")
SAMPLED = 1


class TraceContext(msgspec.Struct, frozen=True, kw_only=True):
    """Where in a trace something happens. `sampled`: its spans are to be kept."""

    trace_id: str
    span_id: str
    sampled: bool = True

    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def read_traceparent(value: str | None) -> TraceContext | None:
    """None for a header that is absent or malformed: W3C trace context says to ignore it, not to refuse the request."""
    match = None if value is None else _TRACEPARENT.fullmatch(value)
    if match is None or (match["version"] == "00" and match["more"]):
        return None
    return TraceContext(
        trace_id=match["trace_id"], span_id=match["span_id"], sampled=bool(int(match["flags"], 16) & SAMPLED)
    )


def single_traceparent(values: Sequence[str]) -> str | None:
    """The header as it came, if it came once: of several nobody can tell which one is meant, and none counts."""
    return values[0] if len(values) == 1 else None


def read_tracestate(value: str | None) -> str | None:
    """None for a header that is absent or not to be passed on."""
    text = (value or "").strip(" \t")
    return text if _TRACESTATE.fullmatch(text) else None


def trace_id_of(saga: Saga) -> str:
    """The trace of whoever started the saga, or one named after the saga itself."""
    return saga.saga_id.replace("-", "") if saga.traceparent is None else saga.traceparent[3:35]


def context_of(saga: Saga) -> TraceContext:
    """The saga's own span, in its trace; a caller that says not to keep the trace is heeded."""
    return TraceContext(trace_id=trace_id_of(saga), span_id=_span_id(saga.saga_id), sampled=_is_sampled(saga))


def parent_of(saga: Saga) -> str | None:
    """The span the saga's own is below: the request that started it, or the caller's. None: it is the root."""
    return None if saga.traceparent is None else saga.traceparent[36:52]


def context_of_attempt(saga: Saga, key: str, attempt: int) -> TraceContext:
    """The span of one attempt, which participants see as their parent; `key` is its idempotency key."""
    span_id = _span_id(f"{key}:{saga.epoch}:{attempt}")
    return TraceContext(trace_id=trace_id_of(saga), span_id=span_id, sampled=_is_sampled(saga))


def _is_sampled(saga: Saga) -> bool:
    return saga.traceparent is None or bool(int(saga.traceparent[-2:], 16) & SAMPLED)


def _span_id(name: str) -> str:
    return hashlib.blake2s(name.encode(), digest_size=8).hexdigest()


# --- spans -----------------------------------------------------------------------------------------------------------

Attribute = str | int | bool


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was done, from `started_at` to `ended_at`. `kind`: what it was for the other side of a call.
    `parent`: the id of the span it is below, None: it is the first of its trace. `error`: why it failed, as it was
    said; tracers mask it whole."""

    name: str
    kind: Literal["internal", "server", "client"]
    context: TraceContext
    parent: str | None
    started_at: datetime
    ended_at: datetime
    attributes: Mapping[str, Attribute]
    tracestate: str | None = None
    error: str | None = None


class Tracer:
    """Keeps no spans; the base of tracers that do. Who finds `enabled` False need not make any."""

    enabled = False

    def keep(self, span: Span) -> None:
        """Takes an ended span. Returns at once and never raises: spans may be lost, sagas may not wait for them."""

    def close(self) -> None:
        """Hands on what is left, in bounded time; blocks. Spans that come later are lost."""


def saga_span(saga: Saga) -> Span:
    """The saga as a whole, once it has ended; from the row alone, so that any worker can tell."""
    error = None
    if saga.status is SagaStatus.FAILED or saga.compensation_failed:
        error = saga.error_message or "a compensation failed"
    return Span(
        name=f"saga {saga.workflow_name}",
        kind="internal",
        context=context_of(saga),
        parent=parent_of(saga),
        started_at=saga.created_at,
        ended_at=saga.updated_at,
        attributes={
            "saga.id": saga.saga_id,
            "saga.workflow": saga.workflow_name,
            "saga.workflow_version": saga.workflow_version,
            "saga.status": saga.status.value,
            "saga.compensation_failed": saga.compensation_failed,
            **({} if saga.correlation_id is None else {"saga.correlation_id": saga.correlation_id}),
        },
        tracestate=saga.tracestate,
        error=error,
    )


def attempt_span(
    saga: Saga,
    command: Call,
    step: Step,
    answer: Answer | None,
    *,
    context: TraceContext,
    began_at: datetime,
    seconds: float,
) -> Span:
    """One attempt; `answer` None: it was cut off by a cancel, a deadline or the end of its worker."""
    code = "CANCELLED" if answer is None else answer.code
    error = None
    if answer is None:
        error = "cut off before it was answered"
    elif answer.outcome is not Outcome.DONE:
        error = f"{code}: {answer.message}"
    return Span(
        name=f"{command.action.lower()} {step.name}",
        kind="client",
        context=context,
        parent=context_of(saga).span_id,
        started_at=began_at,
        ended_at=began_at + timedelta(seconds=seconds),
        attributes={
            "saga.id": saga.saga_id,
            "saga.workflow": saga.workflow_name,
            "saga.step": step.name,
            "saga.step_index": command.step_index,
            "saga.action": command.action.value,
            "saga.attempt": command.attempt,
            "saga.epoch": saga.epoch,
            "saga.service": step.service,
            "rpc.system.name": "grpc",
            "rpc.method": step.method_of(command.action),
            "rpc.response.status_code": code,
        },
        tracestate=saga.tracestate,
        error=error,
    )
