"""The ids of a saga's trace: what is read of a caller's headers, and what everybody arrives at from the row alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from saga.facts import Call
from saga.model import Saga, SagaStatus, StepAction
from saga.ports import Answer, Outcome
from saga.request_span import RequestSpan
from saga.tracing import (
    Span,
    TraceContext,
    Tracer,
    attempt_span,
    context_of,
    context_of_attempt,
    parent_of,
    read_traceparent,
    read_tracestate,
    saga_span,
    trace_id_of,
)
from saga.workflow import Step

TRACE, PARENT = "a" * 32, "b" * 16
CREATED = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SAGA = Saga(
    saga_id="6f1dd9ae-6f9c-4a0c-8b57-0d1b2f3a4c5d",
    workflow_name="order",
    workflow_version=3,
    status=SagaStatus.RUNNING,
    payload={},
    created_at=CREATED,
    updated_at=CREATED + timedelta(seconds=9),
    correlation_id="c-1",
    epoch=2,
)
STEP = Step(name="charge", service="payment", method="Pay.Charge", compensate="Pay.Refund")


class Kept(Tracer):
    enabled = True

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def keep(self, span: Span) -> None:
        self.spans.append(span)


def changed(**values: Any) -> Saga:
    return msgspec.structs.replace(SAGA, **values)


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-03", True),
        (f"cc-{TRACE}-{PARENT}-01", True),
        (f"cc-{TRACE}-{PARENT}-00-what-the-future-is-like", False),
    ],
)
def test_a_callers_context_is_read_whatever_its_version(header: str, sampled: bool) -> None:
    context = read_traceparent(header)
    assert context == TraceContext(trace_id=TRACE, span_id=PARENT, sampled=sampled)
    assert context.traceparent() == f"00-{TRACE}-{PARENT}-{'01' if sampled else '00'}"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\n",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
    ],
)
def test_a_malformed_context_is_as_good_as_none(header: str | None) -> None:
    assert read_traceparent(header) is None


@pytest.mark.parametrize(
    ("header", "passed_on"),
    [
        ("a=1,b=2", "a=1,b=2"),
        (" a=1 ", "a=1"),
        ("", None),
        (None, None),
        ("a=\n", None),
        ("é=1", None),
        ("a" * 513, None),
    ],
)
def test_tracestate_is_passed_on_as_it_is_or_not_at_all(header: str | None, passed_on: str | None) -> None:
    assert read_tracestate(header) == passed_on


def test_a_saga_nobody_has_a_trace_for_has_one_named_after_it() -> None:
    assert trace_id_of(SAGA) == SAGA.saga_id.replace("-", "")
    assert parent_of(SAGA) is None
    assert context_of(SAGA).sampled


def test_a_saga_started_in_a_trace_is_in_it_below_whoever_started_it() -> None:
    saga = changed(traceparent=f"00-{TRACE}-{PARENT}-00")
    assert (trace_id_of(saga), parent_of(saga)) == (TRACE, PARENT)
    assert not context_of(saga).sampled
    assert context_of_attempt(saga, "key", 1).traceparent().endswith("-00")


def test_each_attempt_has_a_span_of_its_own_that_anybody_arrives_at() -> None:
    named = {
        context_of_attempt(saga, key, attempt).span_id
        for saga in (SAGA, changed(epoch=3))
        for key in ("s:0:execute", "s:0:compensate")
        for attempt in (1, 2)
    }
    assert len(named | {context_of(SAGA).span_id}) == 9
    later = changed(status=SagaStatus.COMPENSATING, owner="another", revision=7)
    assert context_of(later) == context_of(SAGA)


@pytest.mark.parametrize(
    ("answer", "code", "error"),
    [
        (Answer(outcome=Outcome.DONE, response={}), "OK", None),
        (Answer(outcome=Outcome.REFUSED, code="ABORTED", message="no"), "ABORTED", "ABORTED: no"),
        (None, "CANCELLED", "cut off before it was answered"),
    ],
)
def test_the_span_of_an_attempt_tells_what_came_of_it(answer: Answer | None, code: str, error: str | None) -> None:
    call = Call(step_index=1, action=StepAction.COMPENSATE, attempt=4)
    context = context_of_attempt(SAGA, "key", 4)
    span = attempt_span(SAGA, call, STEP, answer, context=context, began_at=CREATED, seconds=1.5)
    assert (span.name, span.kind, span.context, span.error) == ("compensate charge", "client", context, error)
    assert span.parent == context_of(SAGA).span_id
    assert span.ended_at - span.started_at == timedelta(seconds=1.5)
    assert span.attributes == {
        "saga.id": SAGA.saga_id,
        "saga.workflow": "order",
        "saga.step": "charge",
        "saga.step_index": 1,
        "saga.action": "COMPENSATE",
        "saga.attempt": 4,
        "saga.epoch": 2,
        "saga.service": "payment",
        "rpc.system.name": "grpc",
        "rpc.method": "Pay.Refund",
        "rpc.response.status_code": code,
    }


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ({"status": SagaStatus.COMPLETED}, None),
        ({"status": SagaStatus.CANCELLED}, None),
        ({"status": SagaStatus.FAILED, "error_message": "step failed"}, "step failed"),
        ({"status": SagaStatus.CANCELLED, "compensation_failed": True}, "a compensation failed"),
    ],
)
def test_the_span_of_a_saga_is_from_its_creation_to_its_end(end: dict[str, Any], error: str | None) -> None:
    span = saga_span(changed(**end))
    assert (span.started_at, span.ended_at, span.error) == (CREATED, SAGA.updated_at, error)
    assert span.context.span_id == context_of(SAGA).span_id
    assert span.attributes["saga.status"] == end["status"]
    assert span.attributes["saga.correlation_id"] == "c-1"


def test_a_request_is_below_its_caller_and_joins_the_saga_that_it_starts() -> None:
    tracer = Kept()
    below = RequestSpan(tracer, f"00-{TRACE}-{PARENT}-00", "v=1")
    below.end("GET /x", 0.25, {}, "HTTP 500")
    alone = RequestSpan(tracer, "nonsense", "v=1")
    alone.joins(changed(traceparent=f"00-{TRACE}-{PARENT}-01"))  # somebody else's
    alone.end("GET /y", 0.0, {}, None)
    starting = RequestSpan(tracer, None, None)
    starting.joins(changed(traceparent=f"00-{TRACE}-{starting.span_id}-01"))
    starting.end("POST /z", 0.0, {}, None)

    first, second, third = tracer.spans
    assert (first.context.trace_id, first.parent, first.tracestate, first.error) == (TRACE, PARENT, "v=1", "HTTP 500")
    assert not first.context.sampled
    assert (second.parent, second.tracestate) == (None, None)
    assert second.context.trace_id != TRACE
    assert (third.context.trace_id, third.context.span_id, third.parent) == (TRACE, starting.span_id, None)
