"""Workflows and sagas to test the core with, and the shortest way to say how a saga got where it is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from saga.facts import (
    Began,
    CompensationFailed,
    CompensationRetried,
    CompensationSucceeded,
    Cut,
    Fact,
    StepFailed,
    StepRetried,
    StepSucceeded,
)
from saga.model import Json, Saga, SagaStatus
from saga.ports import Answer, Outcome
from saga.transitions import advance
from saga.workflow import RetryPolicy, Step, WorkflowDefinition

T0 = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BEGAN = T0 + timedelta(seconds=1)
AT = T0 + timedelta(seconds=2)
SAGA_ID = "01234567-89ab-4cde-8f01-23456789abcd"
SENT: Json = {"sent": 1}
GOT: Json = {"got": 2}


def step(name: str, **changes: Any) -> Step:
    """A step of service `svc` with a compensation, unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "name": name,
        "service": "svc",
        "method": f"Svc.{name.capitalize()}",
        "compensate": f"Svc.Undo{name.capitalize()}",
    }
    return Step(**(fields | changes))


def workflow(*steps: Step, timeout_secs: float | None = 60.0, name: str = "order") -> WorkflowDefinition:
    return WorkflowDefinition(name=name, steps=steps or (step("a"), step("b"), step("c")), timeout_secs=timeout_secs)


def patient(max_attempts: int = 3, **changes: Any) -> RetryPolicy:
    return RetryPolicy(max_attempts=max_attempts, **changes)


def saga(status: SagaStatus = SagaStatus.STARTED, **changes: Any) -> Saga:
    """A saga of `workflow()` owned by worker `w` in its third epoch."""
    fields: dict[str, Any] = {
        "saga_id": SAGA_ID,
        "workflow_name": "order",
        "workflow_version": 1,
        "status": status,
        "payload": {"order": 7},
        "created_at": T0,
        "updated_at": T0,
        "owner": "w",
        "epoch": 3,
    }
    return Saga(**(fields | changes))


def running(current_step: int = 0, attempt: int = 1, **changes: Any) -> Saga:
    return saga(SagaStatus.RUNNING, current_step=current_step, attempt=attempt, revision=5, **changes)


def compensating(*undo_plan: int, current_step: int = 2, attempt: int = 1, **changes: Any) -> Saga:
    return saga(
        SagaStatus.COMPENSATING,
        **{
            "current_step": current_step,
            "attempt": attempt if undo_plan else 0,
            "undo_plan": undo_plan,
            "error_message": "step c failed: INTERNAL",
            "revision": 7,
            **changes,
        },
    )


def after(start: Saga, definition: WorkflowDefinition, *facts: Fact) -> Saga:
    """The saga after these facts, one record each."""
    for fact in facts:
        start = advance(start, definition, fact, AT).after
    return start


began = Began()
cut = Cut(request=SENT, started_at=BEGAN)


def succeeded(response: Json | None = None) -> StepSucceeded:
    return StepSucceeded(request=SENT, started_at=BEGAN, response=GOT if response is None else response)


def retried(delay_secs: float = 1.0, *, unknown: bool = False) -> StepRetried:
    return StepRetried(
        request=SENT, started_at=BEGAN, code="ABORTED", message="busy", delay_secs=delay_secs, unknown=unknown
    )


def failed(code: str = "FAILED_PRECONDITION", message: str = "no", *, unknown: bool = False) -> StepFailed:
    return StepFailed(request=SENT, started_at=BEGAN, code=code, message=message, unknown=unknown)


def undone() -> CompensationSucceeded:
    return CompensationSucceeded(request=SENT, started_at=BEGAN, response=GOT)


def undo_retried(delay_secs: float = 1.0) -> CompensationRetried:
    return CompensationRetried(request=SENT, started_at=BEGAN, code="ABORTED", message="busy", delay_secs=delay_secs)


def undo_failed(code: str = "INTERNAL", message: str = "no") -> CompensationFailed:
    return CompensationFailed(request=SENT, started_at=BEGAN, code=code, message=message)


def done(response: Json | None = None) -> Answer:
    return Answer(outcome=Outcome.DONE, response=GOT if response is None else response)


def refused(code: str = "FAILED_PRECONDITION", **changes: Any) -> Answer:
    return Answer(outcome=Outcome.REFUSED, code=code, message="no", **changes)


def unknown(code: str = "UNAVAILABLE", **changes: Any) -> Answer:
    return Answer(outcome=Outcome.UNKNOWN, code=code, message="gone", **changes)


def changed(before: Saga, now: Saga) -> dict[str, Any]:
    """The fields that differ: name to new value."""
    was, are = msgspec.structs.asdict(before), msgspec.structs.asdict(now)
    return {name: value for name, value in are.items() if was[name] != value}
