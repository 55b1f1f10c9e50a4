"""What a saga does next, as data and plain functions.

`TRANSITIONS` is the one table of states: the engine, the stores' guards, the diagram in the docs and the tests read it.
`next_command` says what a saga needs, from stored state alone, so that a saga read back after a crash is asked the same
question as one that never stopped. `judge` turns what came of an attempt into a fact. `advance` applies a fact and
whatever follows from it without asking anybody, and gives the one record to be stored.

Nothing here awaits, reads a clock or draws a random number: instants and draws are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from saga.errors import BrokenRule
from saga.facts import (
    AllStepsDone,
    Began,
    Call,
    CancelObserved,
    Command,
    CompensationFailed,
    CompensationMarkedDone,
    CompensationRetried,
    CompensationSkipped,
    CompensationSucceeded,
    DeadlinePassed,
    Fact,
    StepFailed,
    StepRetried,
    StepSucceeded,
    UndoDone,
    UndoDoneAfterCancel,
    UndoRetryRequested,
)
from saga.model import EventType, Json, LogEntry, Saga, SagaEvent, SagaStatus, StepAction, StepStatus
from saga.ports import Answer, Outcome, Record
from saga.workflow import OnUnknown, Step, WorkflowDefinition

_S = SagaStatus

TRANSITIONS: Mapping[SagaStatus, Mapping[type[Fact], SagaStatus]] = {
    _S.STARTED: {
        Began: _S.RUNNING,
        CancelObserved: _S.CANCELLED,
    },
    _S.RUNNING: {
        StepSucceeded: _S.RUNNING,
        StepRetried: _S.RUNNING,
        AllStepsDone: _S.COMPLETED,
        StepFailed: _S.COMPENSATING,
        DeadlinePassed: _S.COMPENSATING,
        CancelObserved: _S.COMPENSATING,
    },
    _S.COMPENSATING: {
        CompensationSucceeded: _S.COMPENSATING,
        CompensationRetried: _S.COMPENSATING,
        CompensationFailed: _S.COMPENSATING,
        CompensationSkipped: _S.COMPENSATING,
        CompensationMarkedDone: _S.COMPENSATING,
        UndoDone: _S.FAILED,
        UndoDoneAfterCancel: _S.CANCELLED,
    },
    _S.COMPLETED: {},
    # Final for the engine. Only an operator's request to undo what could not be undone opens them again.
    _S.FAILED: {UndoRetryRequested: _S.COMPENSATING},
    _S.CANCELLED: {UndoRetryRequested: _S.COMPENSATING},
}

ANNOUNCED: Mapping[SagaStatus, EventType] = {
    _S.STARTED: EventType.SAGA_STARTED,
    _S.RUNNING: EventType.SAGA_RUNNING,
    _S.COMPENSATING: EventType.SAGA_COMPENSATING,
    _S.COMPLETED: EventType.SAGA_COMPLETED,
    _S.FAILED: EventType.SAGA_FAILED,
    _S.CANCELLED: EventType.SAGA_CANCELLED,
}
"""The event that tells of entering each state."""

LONGEST_PAUSE_SECS = 365 * 86_400.0
"""No pause is longer, whatever a workflow or a participant asks for: its end must still be a date a store can write."""


def next_command(saga: Saga, definition: WorkflowDefinition) -> Command | None:
    """What this saga needs now: a call, or a fact that already holds and only has to be recorded; None: nothing."""
    if saga.status is _S.STARTED:
        return CancelObserved() if saga.cancel_requested else Began()
    if saga.status is _S.RUNNING:
        if saga.cancel_requested:
            return CancelObserved()
        if saga.current_step >= len(definition.steps):
            return AllStepsDone()
        return Call(saga.current_step, StepAction.EXECUTE, saga.attempt)
    if saga.status is _S.COMPENSATING:
        if not saga.undo_plan:
            return UndoDoneAfterCancel() if saga.cancel_requested else UndoDone()
        index = saga.undo_plan[0]
        if definition.steps[index].compensate is None:
            return CompensationSkipped()
        correction = saga.undo_corrections.get(index)
        if correction is not None and correction.request is None:
            return CompensationMarkedDone()
        return Call(index, StepAction.COMPENSATE, saga.attempt)
    return None


def judge(
    definition: WorkflowDefinition,
    call: Call,
    answer: Answer,
    *,
    request: Json | None,
    started_at: datetime,
    draw: float,
) -> Fact:
    """What an attempt means: done, to be tried again, or failed for good.

    `started_at`: when the first attempt of this action began, as far as this worker knows. `draw`: a random number in
    [0, 1) for the jitter.
    """
    executing = call.action is StepAction.EXECUTE
    if answer.outcome is Outcome.DONE:
        done = StepSucceeded if executing else CompensationSucceeded
        return done(request=request, started_at=started_at, response=answer.response)
    policy = definition.steps[call.step_index].policy(call.action)
    unknown = answer.outcome is Outcome.UNKNOWN
    if not answer.permanent and answer.code not in policy.non_retryable and call.attempt < policy.max_attempts:
        delay_secs = answer.retry_after_secs
        if delay_secs is None:
            delay_secs = policy.delay_secs(call.attempt - 1, draw)
        delay_secs = min(delay_secs, LONGEST_PAUSE_SECS)
        if executing:
            return StepRetried(
                request=request,
                started_at=started_at,
                code=answer.code,
                message=answer.message,
                delay_secs=delay_secs,
                unknown=unknown,
            )
        return CompensationRetried(
            request=request,
            started_at=started_at,
            code=answer.code,
            message=answer.message,
            delay_secs=delay_secs,
        )
    if executing:
        return StepFailed(
            request=request, started_at=started_at, code=answer.code, message=answer.message, unknown=unknown
        )
    return CompensationFailed(request=request, started_at=started_at, code=answer.code, message=answer.message)


def advance(saga: Saga, definition: WorkflowDefinition, fact: Fact, at: datetime) -> Record:
    """The record of a fact and of all that follows from it with nobody to be asked; `at` is the instant of the move.

    A last success completes the saga in the same record, a failure without anything to undo fails it, steps without
    compensation are passed over. `BrokenRule`: the table has no such move; nothing is changed.
    """
    draft = _Draft(saga, definition, at)
    following: Command | None = fact
    while isinstance(following, Fact):
        draft.apply(following)
        following = next_command(draft.saga, definition)
    return draft.record()


class _Draft:
    """A record in the making: the saga so far and what has to be written about it."""

    def __init__(self, saga: Saga, definition: WorkflowDefinition, at: datetime) -> None:
        self.before = saga
        self.saga = saga
        self.definition = definition
        self.at = at
        self.logs: list[LogEntry] = []
        self.events: list[SagaEvent] = []
        self.path: list[Saga] = []
        self.retry_in_secs: float | None = None
        self.deadline_in_secs: float | None = None
        self.action_began: datetime | None = None

    def apply(self, fact: Fact) -> None:
        status = TRANSITIONS[self.saga.status].get(type(fact))
        if status is None:
            raise BrokenRule(f"saga {self.saga.saga_id}: no move from {self.saga.status} on {type(fact).__name__}")
        changed = status is not self.saga.status
        # A pause belongs to the move that asked for it; any later one in the same record is due at once.
        self.retry_in_secs = None
        _APPLY[type(fact)](self, fact, status)
        if changed:
            self.announce(ANNOUNCED[status])

    def move(self, status: SagaStatus, **changes: Any) -> None:
        self.saga = msgspec.structs.replace(
            self.saga, status=status, revision=self.before.revision + 1, next_attempt_at=None, **changes
        )
        if self.path and self.path[-1].status is status:
            self.path[-1] = self.saga
        else:
            self.path.append(self.saga)

    def announce(self, event_type: EventType, error_message: str | None = None) -> None:
        saga = self.saga
        self.events.append(
            SagaEvent(
                event_type=event_type,
                status=saga.status,
                current_step=saga.current_step,
                error_message=error_message or saga.error_message,
            )
        )

    def log(
        self,
        index: int,
        action: StepAction,
        status: StepStatus,
        *,
        attempts: int,
        started_at: datetime | None = None,
        request: Json | None = None,
        response: Json | None = None,
        error: str | None = None,
    ) -> None:
        self.logs.append(
            LogEntry(
                step_index=index,
                step_name=self.definition.steps[index].name,
                action=action,
                status=status,
                started_at=started_at or self.at,
                completed_at=self.at,
                attempts=attempts,
                request_payload=request,
                response_payload=response,
                error_message=error,
            )
        )

    def record(self) -> Record:
        return Record(
            before=self.before,
            after=self.saga,
            logs=tuple(self.logs),
            events=tuple(self.events),
            path=tuple(self.path),
            retry_in_secs=self.retry_in_secs,
            deadline_in_secs=self.deadline_in_secs,
        )

    # What the facts do. Each says only what differs from the saga before.

    def begin(self, fact: Began, status: SagaStatus) -> None:
        self.deadline_in_secs = self.definition.timeout_secs
        # Nobody was called yet, whatever cut a worker off before this.
        self.move(status, attempt=1, outcome_unknown=False)

    def step_succeeded(self, fact: StepSucceeded, status: SagaStatus) -> None:
        saga = self.saga
        self.log(
            saga.current_step,
            StepAction.EXECUTE,
            StepStatus.SUCCESS,
            attempts=saga.attempt,
            started_at=fact.started_at,
            request=fact.request,
            response=fact.response,
        )
        self.move(status, current_step=saga.current_step + 1, attempt=1, outcome_unknown=False, error_message=None)

    def step_retried(self, fact: StepRetried, status: SagaStatus) -> None:
        saga = self.saga
        self.retry_in_secs = fact.delay_secs
        self.action_began = fact.started_at
        cause = _cause(fact.code, fact.message)
        self.move(
            status,
            attempt=saga.attempt + 1,
            outcome_unknown=saga.outcome_unknown or fact.unknown,
            # Told while the saga waits, which may be hours; a success takes it back.
            error_message=f"step {self.step.name}: attempt {saga.attempt} failed: {cause}",
        )

    def complete(self, fact: AllStepsDone, status: SagaStatus) -> None:
        self.move(status, attempt=0)

    def step_failed(self, fact: StepFailed, status: SagaStatus) -> None:
        saga = self.saga
        cause = _cause(fact.code, fact.message)
        self.log(
            saga.current_step,
            StepAction.EXECUTE,
            _failure(fact.code),
            attempts=saga.attempt,
            started_at=fact.started_at,
            request=fact.request,
            error=cause,
        )
        self.start_undo(
            status,
            f"step {self.step.name} failed: {cause}",
            failed_step_unknown=saga.outcome_unknown or fact.unknown,
        )

    def deadline_passed(self, fact: DeadlinePassed, status: SagaStatus) -> None:
        reason = f"the workflow's deadline of {self.definition.timeout_secs:g} s passed"
        self.stop_forward(fact, StepStatus.TIMEOUT, reason, status)

    def cancel(self, fact: CancelObserved, status: SagaStatus) -> None:
        if status is _S.CANCELLED:
            self.move(status, cancel_requested=True, error_message="cancelled before it began", attempt=0)
        else:
            self.stop_forward(fact, StepStatus.FAILED, "cancelled", status, cancel_requested=True)

    def stop_forward(
        self,
        fact: DeadlinePassed | CancelObserved,
        log_status: StepStatus,
        reason: str,
        status: SagaStatus,
        **changes: Any,
    ) -> None:
        """Ends the forward phase from outside, whether an attempt was running, one was due, or none was begun."""
        saga, cut = self.saga, fact.cut
        begun = saga.attempt if cut is not None else saga.attempt - 1
        unknown = saga.outcome_unknown or cut is not None
        where = ""
        if begun > 0 or unknown:
            where = f" during step {self.step.name}"
            if cut is not None:
                meanwhile = "while an attempt was running"
            elif saga.error_message is not None:
                meanwhile = f"while waiting to try again; {saga.error_message}"
            else:
                meanwhile = "while waiting to try again"
            self.log(
                saga.current_step,
                StepAction.EXECUTE,
                log_status,
                attempts=max(begun, 1),
                started_at=cut.started_at if cut else fact.began_at or self.action_began,
                request=cut.request if cut else None,
                error=f"{reason} {meanwhile}",
            )
        self.start_undo(status, reason + where, failed_step_unknown=unknown, **changes)

    def start_undo(self, status: SagaStatus, reason: str, *, failed_step_unknown: bool, **changes: Any) -> None:
        plan = range(self.saga.current_step - 1, -1, -1)
        first: tuple[int, ...] = ()
        if failed_step_unknown and self.step.on_unknown is OnUnknown.COMPENSATE:
            first = (self.saga.current_step,)
        undo_plan = (*first, *plan)
        self.move(
            status,
            error_message=reason,
            undo_plan=undo_plan,
            attempt=1 if undo_plan else 0,
            outcome_unknown=False,
            **changes,
        )

    def compensation_succeeded(self, fact: CompensationSucceeded, status: SagaStatus) -> None:
        self.log(
            self.saga.undo_plan[0],
            StepAction.COMPENSATE,
            StepStatus.SUCCESS,
            attempts=self.saga.attempt,
            started_at=fact.started_at,
            request=fact.request,
            response=fact.response,
            error=self.note,
        )
        self.next_undo(status)

    def compensation_marked_done(self, fact: CompensationMarkedDone, status: SagaStatus) -> None:
        self.log(
            self.saga.undo_plan[0],
            StepAction.COMPENSATE,
            StepStatus.SUCCESS,
            attempts=0,
            error=self.note,
        )
        self.next_undo(status)

    def compensation_skipped(self, fact: CompensationSkipped, status: SagaStatus) -> None:
        self.log(self.saga.undo_plan[0], StepAction.COMPENSATE, StepStatus.SKIPPED, attempts=0)
        self.next_undo(status)

    def compensation_retried(self, fact: CompensationRetried, status: SagaStatus) -> None:
        self.retry_in_secs = fact.delay_secs
        self.move(status, attempt=self.saga.attempt + 1)

    def compensation_failed(self, fact: CompensationFailed, status: SagaStatus) -> None:
        index = self.saga.undo_plan[0]
        cause = _cause(fact.code, fact.message)
        self.log(
            index,
            StepAction.COMPENSATE,
            _failure(fact.code),
            attempts=self.saga.attempt,
            started_at=fact.started_at,
            request=fact.request,
            error=cause if self.note is None else f"{cause} ({self.note})",
        )
        self.next_undo(status, undo_failed=(*self.saga.undo_failed, index), compensation_failed=True)
        self.announce(
            EventType.SAGA_COMPENSATION_FAILED,
            f"compensation of step {self.definition.steps[index].name} failed: {cause}",
        )

    def next_undo(self, status: SagaStatus, **changes: Any) -> None:
        ended, *left = self.saga.undo_plan
        corrections = self.saga.undo_corrections
        if ended in corrections:
            # A correction is good for one run: the next one, if there is any, begins with the workflow's own request.
            changes["undo_corrections"] = {index: one for index, one in corrections.items() if index != ended}
        self.move(status, undo_plan=tuple(left), attempt=1 if left else 0, **changes)

    @property
    def note(self) -> str | None:
        """What the log tells of the operator's part in the compensation in hand."""
        correction = self.saga.undo_corrections.get(self.saga.undo_plan[0])
        if correction is None or correction.reason is None:
            return None
        return f"{'done by hand' if correction.request is None else 'request corrected'}: {correction.reason}"

    def undo_done(self, fact: Fact, status: SagaStatus) -> None:
        # The flag tells of compensations that are failed now: a successful second run takes it back.
        self.move(status, attempt=0, compensation_failed=bool(self.saga.undo_failed))

    def undo_again(self, fact: UndoRetryRequested, status: SagaStatus) -> None:
        if not self.saga.undo_failed:
            raise BrokenRule(f"saga {self.saga.saga_id}: no compensation has failed")
        if not fact.corrections.keys() <= set(self.saga.undo_failed):
            raise BrokenRule(f"saga {self.saga.saga_id}: a correction of a compensation that has not failed")
        self.move(
            status,
            undo_plan=self.saga.undo_failed,
            undo_failed=(),
            undo_corrections=dict(fact.corrections),
            attempt=1,
        )

    @property
    def step(self) -> Step:
        return self.definition.steps[self.saga.current_step]


_APPLY: Mapping[type[Fact], Callable[[_Draft, Any, SagaStatus], None]] = {
    Began: _Draft.begin,
    StepSucceeded: _Draft.step_succeeded,
    StepRetried: _Draft.step_retried,
    StepFailed: _Draft.step_failed,
    DeadlinePassed: _Draft.deadline_passed,
    CancelObserved: _Draft.cancel,
    AllStepsDone: _Draft.complete,
    CompensationSucceeded: _Draft.compensation_succeeded,
    CompensationRetried: _Draft.compensation_retried,
    CompensationFailed: _Draft.compensation_failed,
    CompensationSkipped: _Draft.compensation_skipped,
    CompensationMarkedDone: _Draft.compensation_marked_done,
    UndoDone: _Draft.undo_done,
    UndoDoneAfterCancel: _Draft.undo_done,
    UndoRetryRequested: _Draft.undo_again,
}


def _cause(code: str, message: str) -> str:
    return f"{code}: {message}" if message else code


def _failure(code: str) -> StepStatus:
    return StepStatus.TIMEOUT if code == "DEADLINE_EXCEEDED" else StepStatus.FAILED
