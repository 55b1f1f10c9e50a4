"""What must hold of every run. Written from docs/semantics.md, not from the engine: its own table of states, its own
idea of the order of undos, its own count of attempts.

Most rules are checked at the instant something happens (a move lands, a call begins, a client is answered), the rest
when the run is over. A breach is noted, never raised: the engine catches errors, and would put the saga aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from saga.audit import AuditAction, AuditFilter
from saga.model import EventType, Saga, SagaEvent, SagaStatus, StepAction, StepLog, StepStatus
from saga.ports import Answer, Created, Outcome, Recorded, StepCall
from saga.workflow import OnUnknown, WorkflowDefinition
from store.rows import CreateRow, MoveRow
from tests.simulation.broker import TOPIC, Broker
from tests.simulation.door import Database, Door
from tests.simulation.tables import Tables

if TYPE_CHECKING:
    from tests.simulation.world import Worker, World

STARTED, RUNNING, COMPENSATING = SagaStatus.STARTED, SagaStatus.RUNNING, SagaStatus.COMPENSATING
COMPLETED, FAILED, CANCELLED = SagaStatus.COMPLETED, SagaStatus.FAILED, SagaStatus.CANCELLED
FINAL = {COMPLETED, FAILED, CANCELLED}

LEGAL = {
    STARTED: {RUNNING, CANCELLED},
    RUNNING: {RUNNING, COMPENSATING, COMPLETED},
    COMPENSATING: {COMPENSATING, FAILED, CANCELLED},
    COMPLETED: set[SagaStatus](),
    FAILED: {COMPENSATING},
    CANCELLED: {COMPENSATING},
}

CLOCKS_DIFFER_SECS = 2e-6
"""Stored instants have microseconds, waits have not."""


class Attempts(msgspec.Struct):
    """The calls of one action in one round of it: the last number, by which epoch, and how many numbers there were."""

    number: int = 0
    epoch: int = 0


class Trail(msgspec.Struct):
    """What the audit knows of one saga by itself."""

    number: int
    workflow: WorkflowDefinition
    accepted: bool = False
    cancel_sent: bool = False
    cancel_answered: bool = False
    reopened: list[tuple[int, ...]] = []
    begun: bool = False
    attempts: dict[tuple[int, StepAction, int], Attempts] = {}
    maybe_done: set[int] = set()
    """Steps some attempt of which may have taken effect without the engine being told so."""
    ended: SagaStatus | None = None
    in_flight: tuple[str, int] | None = None


class Audit:
    """`violations` stays empty, or the engine is broken."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.violations: list[str] = []
        self.trails: dict[str, Trail] = {}
        self.attempts = 0
        self.moves = 0
        self.events = 0
        self._by_key: dict[str, str] = {}

    def breach(self, rule: str, *about: object) -> None:
        self.violations.append(f"{rule}: {' '.join(map(str, about))}")
        self._world.chance.note("BREACH", rule, *about)

    # --- the store ---------------------------------------------------------------------------------------------------

    def create(self, door: Door, row: CreateRow) -> Created | Exception:
        """Lets the creation land and looks at it."""
        result = door.database.write_batch([row])[0]
        assert not isinstance(result, Recorded)
        world = self._world
        world.chance.note("create", door.worker_id, row.new.saga_id, type(result).__name__)
        if isinstance(result, Created) and not result.replayed:
            number = row.new.payload["order"]
            known = self.trails.setdefault(
                row.new.saga_id, Trail(number, world.definition(row.new.workflow_name, row.new.workflow_version))
            )
            if known.number != number:
                self.breach("one id, two sagas", row.new.saga_id)
            key = row.new.idempotency_key
            if key is not None and self._by_key.setdefault(key, row.new.saga_id) != row.new.saga_id:
                self.breach("one idempotency key, two sagas", key)
        return result

    def move(self, door: Door, row: MoveRow) -> Recorded | Exception:
        """Lets the move land, or be refused, and compares the row before with the row after."""
        database, record = door.database, row.record
        saga_id = record.before.saga_id
        before = database.get(saga_id)
        result = database.write_batch([row])[0]
        after = database.get(saga_id)
        assert not isinstance(result, Created)
        chance = self._world.chance
        if before is None or after is None:
            self.breach("a move of a saga that is not stored", saga_id)
            return result
        if isinstance(result, Exception):
            chance.note("refused", door.worker_id, saga_id, record.after.status, type(result).__name__)
            if after != before:
                self.breach("a refused move changed the row", saga_id)
            return result
        if after == before:
            chance.note("again" if result.landed else "barred", door.worker_id, saga_id, record.after.status)
            return result
        self.moves += 1
        chance.note("move", door.worker_id, saga_id, after.status, after.revision, after.attempt, after.owner)
        self._check_fence(door, record.before, before, after)
        self._check_move(saga_id, before, [state.status for state in record.path], after)
        return result

    def _check_fence(self, door: Door, believed: Saga, before: Saga, after: Saga) -> None:
        saga_id = before.saga_id
        if (believed.owner, believed.epoch, believed.revision) != (before.owner, before.epoch, before.revision):
            self.breach("a write by a stale owner landed", saga_id, believed.owner, before.owner)
        if before.owner is not None and before.owner.split("/")[0] != door.worker_id and before.status not in FINAL:
            self.breach("a write by a worker that does not own the saga", saga_id, door.worker_id, before.owner)
        if (after.revision, after.epoch) != (before.revision + 1, before.epoch):
            self.breach("a move that is not one revision on", saga_id, before.revision, after.revision)
        if before.cancel_requested and after.status in (COMPLETED, FAILED):
            self.breach("a cancel that was stored was passed over", saga_id, after.status)
        if after.cancel_requested != before.cancel_requested:
            self.breach("a move changed the cancel request", saga_id)

    def _check_move(self, saga_id: str, before: Saga, path: Sequence[SagaStatus], after: Saga) -> None:
        trail = self.trails[saga_id]
        status = before.status
        for state in path:
            if state not in LEGAL[status]:
                self.breach("an illegal move", saga_id, status, state)
            status = state
        trail.begun |= before.status is STARTED and path[0] is RUNNING
        if status is not after.status:
            self.breach("the path ends elsewhere", saga_id, status, after.status)
        if not before.current_step <= after.current_step <= before.current_step + 1:
            self.breach("a step was lost or skipped", saga_id, before.current_step, after.current_step)
        if after.status is COMPLETED and after.current_step != len(trail.workflow.steps):
            self.breach("completed too early", saga_id, after.current_step)
        if before.status in FINAL:
            if after.undo_plan != before.undo_failed:
                self.breach("other undos than those that failed were run again", saga_id, after.undo_plan)
            trail.reopened.append(after.undo_plan)
        if after.status in FINAL:
            if trail.ended is not None and (trail.ended is not after.status or before.status in FINAL):
                self.breach("two final states", saga_id, trail.ended, after.status)
            trail.ended = after.status
            if after.undo_plan or after.attempt:
                self.breach("something is left to do in a final state", saga_id)

    # --- participants ------------------------------------------------------------------------------------------------

    def call_begins(self, worker: Worker, call: StepCall) -> None:
        """What is stored allows this call, and nothing else does."""
        self.attempts += 1
        saga_id, epoch = call.saga_id, call.epoch
        self._world.chance.note("call", worker.name, saga_id, call.step_index, call.action, call.attempt, epoch)
        row = self._world.database.get(saga_id)
        trail = self.trails.get(saga_id)
        if row is None or trail is None:
            self.breach("a call for a saga that is not stored", saga_id)
            return
        if (row.owner, row.epoch) != (worker.supervisor.worker_id, epoch):
            self.breach("a call by a worker that does not own the saga", saga_id, worker.name, row.owner, epoch)
        if trail.in_flight is not None:
            self.breach("two calls of one saga at once", saga_id, trail.in_flight, worker.name)
        trail.in_flight = (worker.name, epoch)
        executing = call.action is StepAction.EXECUTE
        due = (RUNNING, row.current_step) if executing else (COMPENSATING, row.undo_plan[0] if row.undo_plan else -1)
        if (row.status, row.attempt) != (due[0], call.attempt) or call.step_index != due[1]:
            self.breach("a call that is not stored as due", saga_id, call.step_index, call.action, row.status)
        if call.idempotency_key != f"{saga_id}:{call.step_index}:{'execute' if executing else 'compensate'}":
            self.breach("another idempotency key", call.idempotency_key)
        now = self._world.clock.now()
        if row.next_attempt_at is not None and (row.next_attempt_at - now).total_seconds() > CLOCKS_DIFFER_SECS:
            self.breach("a call before it was due", saga_id, call.step_index, call.attempt)
        if executing and row.deadline_at is not None:
            late_secs = (now - row.deadline_at).total_seconds()
            if late_secs > CLOCKS_DIFFER_SECS:
                self.breach("a call after the deadline of the workflow", saga_id, late_secs)
        self._check_attempt(trail, call)
        self._check_request(trail, call, executing)

    def _check_attempt(self, trail: Trail, call: StepCall) -> None:
        step = trail.workflow.steps[call.step_index]
        made = trail.attempts.setdefault((call.step_index, call.action, len(trail.reopened)), Attempts())
        again_after_crash = call.attempt == made.number and call.epoch > made.epoch
        if call.attempt != made.number + 1 and not again_after_crash:
            self.breach("an attempt was forgotten or made twice", call.idempotency_key, made.number, call.attempt)
        if call.attempt > step.policy(call.action).max_attempts:
            self.breach("more attempts than allowed", call.idempotency_key, call.attempt)
        made.number, made.epoch = call.attempt, call.epoch

    def _check_request(self, trail: Trail, call: StepCall, executing: bool) -> None:
        expected: dict[str, object] = {"order": trail.number}
        step = trail.workflow.steps[call.step_index]
        if executing and step.input is not None:
            expected |= {"of": call.saga_id}
            if call.step_index:
                expected |= {"token": f"{call.saga_id}/{call.step_index - 1}"}
        if call.request != expected:
            self.breach("another request than the workflow asks for", call.idempotency_key, call.request)

    def call_ends(self, worker: Worker, call: StepCall, answer: Answer | None) -> None:
        """`answer` None: it was reset."""
        trail = self.trails.get(call.saga_id)
        if trail is None:
            return  # told when it began
        if trail.in_flight == (worker.name, call.epoch):
            trail.in_flight = None
        if call.action is StepAction.EXECUTE:
            if answer is not None and answer.outcome is Outcome.DONE and not worker.dead:
                # Until the success is stored it may be lost in a crash, which makes it unknown.
                trail.maybe_done.add(call.step_index)
            elif answer is None or answer.outcome is Outcome.UNKNOWN:
                trail.maybe_done.add(call.step_index)

    # --- clients -----------------------------------------------------------------------------------------------------

    def accepted(self, saga_id: str, number: int, key: str | None) -> None:
        """A client was answered 201."""
        self._world.chance.note("accepted", saga_id, number)
        trail = self.trails.get(saga_id)
        if trail is None or self._world.database.get(saga_id) is None:
            self.breach("answered before it was stored", saga_id)
            return
        if trail.number != number:
            self.breach("answered with another client's saga", saga_id, number)
        if key is not None and self._by_key.get(key) != saga_id:
            self.breach("one idempotency key, two answers", key)
        trail.accepted = True

    def cancel_sent(self, saga_id: str) -> None:
        if (trail := self.trails.get(saga_id)) is not None:
            trail.cancel_sent = True

    def cancel_answered(self, saga_id: str) -> None:
        """A client was answered 200."""
        self._world.chance.note("cancel answered", saga_id)
        self.trails[saga_id].cancel_answered = True
        row = self._world.database.get(saga_id)
        if row is None or (not row.cancel_requested and row.status is not CANCELLED):
            self.breach("a cancel was answered before it was stored", saga_id)

    def cancel_refused(self, saga_id: str) -> None:
        """A client was answered 409."""
        trail = self.trails.get(saga_id)
        if trail is None or trail.ended is None:
            self.breach("a cancel was refused although the saga was open", saga_id)

    def published(self, saga: Saga) -> None:
        """Watchers were told of a state."""
        row = self._world.database.get(saga.saga_id)
        if row is None or row.revision < saga.revision:
            self.breach("announced before it was stored", saga.saga_id, saga.status, saga.revision)

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self, sagas: Sequence[str]) -> None:
        """Everything is over: the ledger, the log and the events of every saga."""
        participants = self._world.participants
        for saga_id in self.trails:
            if saga_id not in sagas:
                self.breach("a saga is gone", saga_id)
        for saga_id in sagas:
            row = self._world.database.get(saga_id)
            assert row is not None
            trail = self.trails[saga_id]
            if row.status not in FINAL:
                self.breach("a saga did not end", saga_id, row.status, row.owner, row.next_attempt_at)
                continue
            if trail.cancel_answered and row.status is not CANCELLED:
                self.breach("a cancel that was answered 200 did not hold", saga_id, row.status)
            if row.status is CANCELLED and not trail.cancel_sent:
                self.breach("cancelled though nobody asked", saga_id)
            if row.compensation_failed is not bool(row.undo_failed):
                self.breach("compensation_failed does not tell of undo_failed", saga_id)
            logs = self._world.database.step_logs(saga_id)
            self._check_logs(row, trail, logs)
            self._check_events(row, trail, logs, self._world.events_of(saga_id))
            self._check_ledger(row, trail, participants.effects, participants.undone)

    def close_log(self, database: Database) -> None:
        """Who asked for what is entered as often as it happened: no change without its entry, no entry without one."""
        entered: Counter[tuple[str | None, AuditAction]] = Counter()
        for entry in database.list_audit(AuditFilter(), 1_000_000, None).entries:
            entered[entry.entered.saga_id, entry.entered.action] += 1
        for saga_id, trail in self.trails.items():
            if (starts := entered[saga_id, AuditAction.START_SAGA]) != 1:
                self.breach("a creation is not entered once", saga_id, starts)
            if (retries := entered[saga_id, AuditAction.RETRY_COMPENSATION]) != len(trail.reopened):
                self.breach("a retry is not entered once", saga_id, retries, len(trail.reopened))
            cancels = entered[saga_id, AuditAction.CANCEL_SAGA]
            if cancels < trail.cancel_answered or (cancels and not trail.cancel_sent):
                self.breach("a cancel is not entered, or was not asked for", saga_id, cancels)
        for named, action in sorted(entered, key=str):
            if named is not None and named not in self.trails:
                self.breach("an entry of a saga that was never created", named, action)

    def close_events(self, tables: Tables, broker: Broker) -> None:
        """Each event has arrived at least once and first in its turn, or was refused for good and laid aside."""
        for saga_id, announced in tables.outbox.items():
            key = saga_id.encode()
            arrived = broker.arrived.get((TOPIC, key), [])
            first = list(dict.fromkeys(arrived))
            expected = [
                (one.event_id, one.event.event_type.value) for one in announced if one.number not in tables.removed
            ]
            if first != expected:
                self.breach("events are missing at the broker, or out of order", saga_id, first, "expected", expected)
            copies = dict.fromkeys(broker.arrived.get((f"{TOPIC}.dlq", key), []))
            for one in announced:
                if one.number in tables.removed and (one.number, TOPIC) not in tables.dead:
                    self.breach("an event was removed and not laid aside", saga_id, one.event)
                if one.event.event_type is not EventType.SAGA_COMPENSATION_FAILED:
                    continue
                copied = (one.event_id, one.event.event_type.value) in copies
                if not copied and (one.number, f"{TOPIC}.dlq") not in tables.dead:
                    self.breach("a failed compensation is not among the dead letters", saga_id)
        if any(tables.unpublished):
            self.breach("events wait for ever", sum(map(len, tables.unpublished)))

    def _check_logs(self, row: Saga, trail: Trail, logs: Sequence[StepLog]) -> None:
        saga_id, reached = row.saga_id, row.current_step
        executed = [log for log in logs if log.action is StepAction.EXECUTE]
        done = [log.step_index for log in executed if log.status is StepStatus.SUCCESS]
        if done != list(range(reached)):
            self.breach("steps that succeeded are not in the log, in order", saga_id, done, reached)
        rest = [log.step_index for log in executed if log.status is not StepStatus.SUCCESS]
        if rest not in ([], [reached]):
            self.breach("a step has two entries, or failed that was not reached", saga_id, rest)
        undone = [log for log in logs if log.action is StepAction.COMPENSATE]
        if executed and undone and logs.index(executed[-1]) > logs.index(undone[0]):
            self.breach("a step was executed after undoing had begun", saga_id)
        self._check_undo_order(row, trail, undone)
        rounds = 0
        left = len(undone) - sum(len(plan) for plan in trail.reopened)
        for log in logs:
            if log.action is StepAction.COMPENSATE:
                while left == 0 and rounds < len(trail.reopened):
                    left = len(trail.reopened[rounds])
                    rounds += 1
                left -= 1
            made = trail.attempts.get((log.step_index, log.action, rounds))
            # What a crash cut off cannot be told from what was never begun: the log may be one attempt short of it.
            number = 0 if made is None else made.number
            cut_off = log.status is not StepStatus.SUCCESS and made is not None and made.epoch < row.epoch
            never_called = made is None and log.attempts == 1 and log.status is not StepStatus.SUCCESS
            if not (log.attempts == number or never_called or (cut_off and log.attempts == number - 1)):
                self.breach("the log tells another number of attempts", saga_id, log.step_index, log.attempts)
            if log.status is StepStatus.SUCCESS and made is None:
                self.breach("a success nobody was called for", saga_id, log.step_index)

    def _check_undo_order(self, row: Saga, trail: Trail, undone: Sequence[StepLog]) -> None:
        order = [log.step_index for log in undone]
        if row.status is COMPLETED:
            if order:
                self.breach("undone although completed", row.saga_id, order)
            return
        reached = row.current_step
        expected = [list(range(reached - 1, -1, -1))]
        if reached < len(trail.workflow.steps) and trail.workflow.steps[reached].on_unknown is OnUnknown.COMPENSATE:
            # Required where an attempt may have taken effect; allowed where a worker could not know.
            with_unknown = [reached, *expected[0]]
            expected = [with_unknown] if reached in trail.maybe_done else [with_unknown, expected[0]]
        again = [index for plan in trail.reopened for index in plan]
        if order not in [[*plan, *again] for plan in expected]:
            self.breach("compensations are not in reverse, each once", row.saga_id, order, "expected", expected, again)

    def _check_events(self, row: Saga, trail: Trail, logs: Sequence[StepLog], events: Sequence[SagaEvent]) -> None:
        told = [event.event_type for event in events]
        self.events += len(told)
        states = [event for event in told if event is not EventType.SAGA_COMPENSATION_FAILED]
        expected = [EventType.SAGA_STARTED]
        if row.status is COMPLETED:
            expected += [EventType.SAGA_RUNNING, EventType.SAGA_COMPLETED]
        else:
            final = EventType.SAGA_FAILED if row.status is FAILED else EventType.SAGA_CANCELLED
            if trail.begun:
                expected += [EventType.SAGA_RUNNING, EventType.SAGA_COMPENSATING]
            expected.append(final)
            for _ in trail.reopened:
                expected += [EventType.SAGA_COMPENSATING, final]
        if states != expected:
            self.breach("the events do not tell what happened", row.saga_id, states, "expected", expected)
        given_up = [
            log
            for log in logs
            if log.action is StepAction.COMPENSATE and log.status in (StepStatus.FAILED, StepStatus.TIMEOUT)
        ]
        if told.count(EventType.SAGA_COMPENSATION_FAILED) != len(given_up):
            self.breach("failed compensations are not announced each once", row.saga_id, told)
        for event in events:
            if (event.status in FINAL) != (event.event_type.removeprefix("SAGA_") in FINAL):
                self.breach("an event tells another state", row.saga_id, event)

    def _check_ledger(self, row: Saga, trail: Trail, effects: dict[str, int], undone: set[str]) -> None:
        saga_id = row.saga_id
        for index, step in enumerate(trail.workflow.steps):
            place = f"{saga_id}:{index}"
            times = effects.get(place, 0)
            if times > 1:
                self.breach("an effect happened twice", place, times)
            if row.status is COMPLETED or (index < row.current_step and step.compensate is None):
                if times != 1 or place in undone:
                    self.breach("an effect is missing", place, row.status)
            elif index in row.undo_failed:
                continue
            elif index < row.current_step:
                if times or place not in undone:
                    self.breach("an effect was not undone", place, row.status)
            elif index == row.current_step:
                if times and step.on_unknown is OnUnknown.COMPENSATE and step.compensate is not None:
                    self.breach("an effect nobody knew of was not undone", place, row.status)
                if times and index not in trail.maybe_done:
                    self.breach("a step that was refused took effect", place)
            elif times:
                self.breach("a step that was never reached took effect", place)
