"""One saga from where it stands to its end: ask `transitions` what it needs, do it, record what came of it, again.

Nothing is decided here. What this file owns is *waiting*: for a participant, for a pause to pass, for a write to be
durable, and what may end each of these waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

import msgspec
import trio

from saga.endings import note_end
from saga.errors import MappingFailed, RowRejected, Unavailable
from saga.facts import Call, CancelObserved, CompensationFailed, Cut, DeadlinePassed, Fact, StepSucceeded
from saga.mapping import build_request
from saga.meter import Meter
from saga.model import Json, SagaStatus, StepAction
from saga.ports import Answer, Claimed, Clock, Outcome, Record, Recorded, StepCall, StepCaller, Store
from saga.store_outage import StoreOutage
from saga.tracing import Tracer, attempt_span, context_of_attempt
from saga.transitions import advance, judge, next_command
from saga.watchers import Watchers
from saga.workflow import Workflow

log = logging.getLogger("saga.runner")

STORE_PAUSE_SECS = (0.05, 5.0)
"""First and longest pause between tries to reach a store that is away. The first is about a fail-over of a pooled
connection, the longest bounds how late a saga notices that the store is back."""

PAST_DEADLINE_SECS = 0.01
"""How long after its deadline a parked saga is woken: above what rounding and two clocks make of one instant, so that
it is not called once more for the last microsecond. A guess."""


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """What every run of this worker shares. `draw` gives random numbers in [0, 1) for retry jitter."""

    store: Store
    caller: StepCaller
    clock: Clock
    watchers: Watchers
    meter: Meter
    draw: Callable[[], float]
    park_after_secs: float
    tracer: Tracer = Tracer()
    outage: StoreOutage = msgspec.field(default_factory=StoreOutage)

    def seconds_left(self, until: datetime | None, secs: float, told_within_secs: float) -> float:
        """Seconds from now to an instant that was `secs` away when the store spoke, which was at most
        `told_within_secs` ago. This machine's clock says how much of that has passed: however wrong it is, it can
        neither add to it nor take more away."""
        left = secs if until is None else (until - self.clock.now()).total_seconds()
        return min(secs, max(secs - told_within_secs, left))


class SagaRun:
    """The run of one saga by the worker that owns it.

    A cancel request ends the wait of the forward phase at once and never one of an undo. `stop` ends pauses and lets
    a running attempt finish. Cancelling the scope `run` is in cuts everything off; whoever does that frees the saga.
    """

    def __init__(self, engine: Engine, claimed: Claimed, workflow: Workflow, *, told_within_secs: float = 0.0) -> None:
        """`told_within_secs`: how long ago, at most, the store said what `claimed` holds."""
        self._engine = engine
        self._definition = workflow.definition
        self.saga = claimed.saga
        self.scope = trio.CancelScope()
        """Everything this run does; the supervisor enters it around `run`, and may have cancelled it before."""
        self._responses = dict(claimed.responses)
        now = trio.current_time()
        self._due = now + claimed.due_in_secs
        self._deadline = float("inf")
        if claimed.deadline_in_secs is not None:
            deadline_at = claimed.saga.deadline_at
            self._deadline = now + engine.seconds_left(deadline_at, claimed.deadline_in_secs, told_within_secs)
        self._cancel_requested = claimed.saga.cancel_requested
        self._stopping = False
        self._forward: trio.CancelScope | None = None
        self._pause: trio.CancelScope | None = None
        self._action_began: datetime | None = None

    def request_cancel(self) -> None:
        """The durable cancel request has reached this worker."""
        self._cancel_requested = True
        if self._forward is not None:
            self._forward.cancel()

    def stop(self) -> None:
        """The worker is going: no further attempt is begun."""
        self._stopping = True
        if self._pause is not None:
            self._pause.cancel()

    async def run(self) -> None:
        """Returns when the saga is terminal, parked, or freed because the worker stops. `LeaseLost`: it has another
        owner; nothing of what was being done is recorded."""
        while True:
            if self._cancel_requested and not self.saga.cancel_requested:
                self.saga = msgspec.structs.replace(self.saga, cancel_requested=True)
            command = next_command(self.saga, self._definition)
            if command is None:
                return
            # A cancel needs nobody's answer: it is written before the saga is let go, so that no pause holds it up.
            if self._stopping and not isinstance(command, CancelObserved):
                await self._engine.store.release(self.saga, interrupted=False)  # a pause it waits for is stored already
                return
            fact = await self._carry_out(command) if isinstance(command, Call) else command
            if fact is not None and await self._record(fact):
                return

    # --- acting ------------------------------------------------------------------------------------------------------

    async def _carry_out(self, command: Call) -> Fact | None:
        """The fact an attempt ends with; None: it was not begun, because the worker stops."""
        executing = command.action is StepAction.EXECUTE
        if not await self._until_due(executing):
            if self._stopping:
                return None
            return self._stopped_forward(None)
        # The write before this may have been seen through although the lease was lost meanwhile, and a caller sends
        # before it waits: a run that is to stop would have called once more.
        await trio.lowlevel.checkpoint_if_cancelled()
        engine, saga = self._engine, self.saga
        began, began_secs = engine.clock.now(), trio.current_time()
        if self._action_began is None:
            self._action_began = began
        step = self._definition.steps[command.step_index]
        key = f"{saga.saga_id}:{command.step_index}:{command.action.lower()}"
        context = context_of_attempt(saga, key, command.attempt)
        answer: Answer | None = None
        request: Json | None = None
        correction = saga.undo_corrections.get(command.step_index)  # there are none but while compensating
        try:
            if correction is not None and correction.request is not None:
                request, strict = correction.request, True
            else:
                request, strict = build_request(step, command.action, saga, self._responses)
            answer = await self._attempt(command, request, strict, key, context.traceparent())
        except MappingFailed as error:
            answer = Answer(outcome=Outcome.NOT_DONE, code="INVALID_ARGUMENT", message=str(error), permanent=True)
        finally:
            # One that is cut off with its worker has its span too: the participant has been told of it.
            if engine.tracer.enabled:
                seconds = trio.current_time() - began_secs
                engine.tracer.keep(
                    attempt_span(saga, command, step, answer, context=context, began_at=began, seconds=seconds)
                )
        if answer is None:
            return self._stopped_forward(Cut(request=request, started_at=self._action_began))
        if answer.outcome is not Outcome.DONE:
            log.info(
                "attempt_failed saga_id=%s step=%s action=%s attempt=%d code=%s message=%r",
                *(saga.saga_id, step.name, command.action, command.attempt, answer.code, answer.message),
            )
        return judge(
            self._definition,
            command,
            answer,
            request=request,
            started_at=self._action_began,
            draw=engine.draw(),
        )

    async def _until_due(self, executing: bool) -> bool:
        """Waits for the pause before an attempt. False: the wait ended for another reason, or its time is not to come
        because the workflow's deadline is first."""
        until = min(self._due, self._deadline) if executing else self._due
        if until > trio.current_time():
            with trio.CancelScope() as pause:
                self._pause = pause
                self._forward = pause if executing else None
                await trio.sleep_until(until)
            self._pause = self._forward = None
            if pause.cancelled_caught:
                return False
        return not executing or trio.current_time() < self._deadline

    async def _attempt(self, command: Call, request: Json, strict: bool, key: str, traceparent: str) -> Answer | None:
        """One call. One scope ends it, whichever comes first: its own timeout, the workflow's deadline, a cancel
        request. None: it was cut off by one of the latter two."""
        executing = command.action is StepAction.EXECUTE
        saga, step = self.saga, self._definition.steps[command.step_index]
        began = trio.current_time()
        ends = began + step.timeout_secs
        answer: Answer | None = None
        with trio.CancelScope(deadline=min(ends, self._deadline) if executing else ends) as scope:
            if executing:
                self._forward = scope
            answer = await self._engine.caller.call(
                StepCall(
                    service=step.service,
                    method=step.method_of(command.action),
                    request=request,
                    strict=strict,
                    timeout_secs=scope.deadline - began,
                    saga_id=saga.saga_id,
                    workflow_name=saga.workflow_name,
                    step_name=step.name,
                    step_index=command.step_index,
                    action=command.action,
                    attempt=command.attempt,
                    epoch=saga.epoch,
                    idempotency_key=key,
                    correlation_id=saga.correlation_id,
                    traceparent=traceparent,
                    tracestate=saga.tracestate,
                )
            )
        self._forward = None
        now = trio.current_time()
        # The participant gets the same deadline we keep, so its answer DEADLINE_EXCEEDED can come first; what had
        # run out is told by the clock, not by who noticed.
        late = answer is None or (answer.outcome is Outcome.UNKNOWN and answer.code == "DEADLINE_EXCEEDED")
        if executing and late and (self._cancel_requested or now >= self._deadline):
            answer = None
        elif answer is None:
            answer = Answer(
                outcome=Outcome.UNKNOWN, code="DEADLINE_EXCEEDED", message=f"no answer within {step.timeout_secs:g} s"
            )
        code = "CANCELLED" if answer is None else answer.code
        method = step.method_of(command.action)
        self._engine.meter.attempt_made(command.action, step.service, method, code, now - began)
        return answer

    def _stopped_forward(self, cut: Cut | None) -> Fact:
        """What ended the forward phase from outside; a cancel request goes before a deadline."""
        began_at = self._action_began
        if self._cancel_requested:
            return CancelObserved(cut=cut, began_at=began_at)
        return DeadlinePassed(cut=cut, began_at=began_at)

    # --- recording ---------------------------------------------------------------------------------------------------

    async def _record(self, fact: Fact) -> bool:
        """Writes the move a fact makes; True: the saga has left this worker (parked)."""
        engine = self._engine
        sent = trio.current_time()
        record, recorded = await self._write(fact)
        before, saga = self.saga, recorded.saga
        for entry in record.logs:
            engine.meter.step_ended(saga.workflow_name, entry.action, entry.status)
        if isinstance(fact, StepSucceeded):
            self._responses[self._definition.steps[before.current_step].name] = fact.response or {}
        elif isinstance(fact, CompensationFailed):
            engine.meter.compensation_failed(saga.workflow_name)
            log.error(
                "compensation_failed saga_id=%s step=%s code=%s message=%r hint=%s",
                saga.saga_id,
                self._definition.steps[before.undo_plan[0]].name,
                fact.code,
                fact.message,
                f"mend the cause, then POST /api/v1/sagas/{saga.saga_id}/retry-compensation when the saga has ended",
            )
        if not before.status.is_terminal and saga.status.is_terminal:
            note_end(saga, engine.meter, engine.tracer)
        if saga.attempt <= 1:
            self._action_began = None
        now = trio.current_time()
        self._due = now + (record.retry_in_secs or 0.0)
        if record.deadline_in_secs is not None:
            # It runs since the write landed, which may be long before its answer came.
            self._deadline = now + engine.seconds_left(saga.deadline_at, record.deadline_in_secs, now - sent)
        self.saga = saga
        engine.watchers.publish(record.path, saga)
        return record.release

    async def _write(self, fact: Fact) -> tuple[Record, Recorded]:
        """Stores the move; goes on trying while the store is away. `LeaseLost`: another owner has the saga."""
        engine = self._engine
        pause_secs, longest = STORE_PAUSE_SECS
        saga, at, bare = self.saga, engine.clock.now(), False
        while True:
            record = self._parked_if_long(advance(saga, self._definition, fact, at))
            if bare:
                record = without_payloads(record)
            try:
                recorded = await engine.store.record(record)
            except Unavailable as error:
                # The same move may be sent again: if it had landed, the store finds its revision and says so.
                engine.outage.failed("moves", error)
                log.debug("move_not_stored saga_id=%s error=%s", saga.saga_id, error)
                await trio.sleep(pause_secs)
                pause_secs = min(pause_secs * 2, longest)
            except RowRejected as error:
                if bare:
                    raise
                # The move matters more than its payloads: an answer that no database takes must not stop an undo.
                log.error("payload_rejected saga_id=%s error=%s", saga.saga_id, error)
                bare = True
            else:
                engine.outage.answered("moves")
                if recorded.landed:
                    return record, recorded
                # A cancel request had come before the end: the same fact means something else now.
                saga = recorded.saga

    def _parked_if_long(self, record: Record) -> Record:
        """The record, giving the saga up if its next attempt is far away."""
        wait_secs = record.retry_in_secs
        if wait_secs is None:
            return record
        if record.after.status is SagaStatus.RUNNING:
            # Nobody watches the deadline of a parked saga: it is woken just after it, for there is nothing left to try.
            wait_secs = min(wait_secs, self._deadline - trio.current_time() + PAST_DEADLINE_SECS)
        if wait_secs <= self._engine.park_after_secs:
            return record
        return msgspec.structs.replace(record, release=True, retry_in_secs=wait_secs)


def without_payloads(record: Record) -> Record:
    """The same move with nothing in its logs that came from a participant."""
    return msgspec.structs.replace(
        record,
        logs=tuple(
            msgspec.structs.replace(
                entry,
                request_payload=None,
                response_payload=None,
                error_message=entry.error_message or "the payloads of this attempt could not be stored",
            )
            for entry in record.logs
        ),
    )
