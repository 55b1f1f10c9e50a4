"""What a saga is: frozen values, and the words (enums) every layer spells the same way.

No behaviour lives here; `transitions.py` decides, `runner.py` acts, a store remembers.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Any

import msgspec

Json = dict[str, Any]
"""A decoded JSON object: payloads, requests and responses of participants."""


class SagaStatus(enum.StrEnum):
    """The six states of a saga; COMPLETED, FAILED and CANCELLED are final unless an operator reopens a failed undo."""

    STARTED = "STARTED"
    RUNNING = "RUNNING"
    COMPENSATING = "COMPENSATING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({SagaStatus.COMPLETED, SagaStatus.FAILED, SagaStatus.CANCELLED})


class StepAction(enum.StrEnum):
    """The two things a step can be asked to do."""

    EXECUTE = "EXECUTE"
    COMPENSATE = "COMPENSATE"


class StepStatus(enum.StrEnum):
    """How an action of a step ended."""

    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    SKIPPED = "SKIPPED"


class EventType(enum.StrEnum):
    """What is announced of a saga (spec section 6)."""

    SAGA_STARTED = "SAGA_STARTED"
    SAGA_RUNNING = "SAGA_RUNNING"
    SAGA_COMPLETED = "SAGA_COMPLETED"
    SAGA_COMPENSATING = "SAGA_COMPENSATING"
    SAGA_FAILED = "SAGA_FAILED"
    SAGA_CANCELLED = "SAGA_CANCELLED"
    SAGA_COMPENSATION_FAILED = "SAGA_COMPENSATION_FAILED"


class UndoCorrection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an operator says of one compensation that had failed and is to be run again.

    `request` is sent in place of what the workflow would build; None: the undo was done by hand, nobody is called.
    `reason`: why, in the operator's words.
    """

    request: Json | None = None
    reason: str | None = None


class Saga(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a workflow, as it is stored.

    `current_step` counts the steps that have succeeded and is never lowered.
    `attempt` is the number, from 1, of the attempt that is running or due for the step or compensation in hand;
    0 when nothing is to be called.
    `outcome_unknown`: an earlier attempt of the step in hand may have taken effect although no success was seen.
    `undo_plan`: indexes of the steps still to be compensated, the next one first; empty outside COMPENSATING.
    `undo_failed`: indexes of the steps whose compensation failed for good, in the order they were tried.
    `undo_corrections`: by index, what an operator corrects about steps in `undo_plan`; each goes when its compensation
    has ended.
    `traceparent` and `tracestate`: the W3C trace context the saga was started in, None where there was none.
    `owner` and `epoch` name the worker that may write and how often the saga has changed hands; `revision` counts the
    writes. A write names all three, so that a stale worker, and a write sent twice, changes nothing.
    """

    saga_id: str
    workflow_name: str
    workflow_version: int
    status: SagaStatus
    payload: Json
    created_at: datetime
    updated_at: datetime
    current_step: int = 0
    correlation_id: str | None = None
    initiated_by: str | None = None
    error_message: str | None = None
    compensation_failed: bool = False
    cancel_requested: bool = False
    attempt: int = 0
    next_attempt_at: datetime | None = None
    deadline_at: datetime | None = None
    outcome_unknown: bool = False
    undo_plan: tuple[int, ...] = ()
    undo_failed: tuple[int, ...] = ()
    undo_corrections: dict[int, UndoCorrection] = {}
    traceparent: str | None = None
    tracestate: str | None = None
    owner: str | None = None
    epoch: int = 0
    revision: int = 0


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One finished action of a step, before the store gives it an id. `attempts` counts the calls made for it."""

    step_index: int
    step_name: str
    action: StepAction
    status: StepStatus
    started_at: datetime
    completed_at: datetime
    attempts: int
    request_payload: Json | None = None
    response_payload: Json | None = None
    error_message: str | None = None


class StepLog(msgspec.Struct, frozen=True, kw_only=True):
    """A `LogEntry` as it was stored."""

    id: str
    saga_id: str
    step_index: int
    step_name: str
    action: StepAction
    status: StepStatus
    started_at: datetime
    completed_at: datetime | None
    attempts: int
    request_payload: Json | None = None
    response_payload: Json | None = None
    error_message: str | None = None


class SagaEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An announcement that commits with the move it tells of; the rest of the message is read from the saga's row."""

    event_type: EventType
    status: SagaStatus
    current_step: int
    error_message: str | None = None
