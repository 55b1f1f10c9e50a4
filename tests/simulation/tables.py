"""What a store remembers, in dictionaries: some ten times faster than a database, with the same fences.

It says what `store.sqlite_database.SqliteDatabase` says, method by method, and shares with it what does not depend on
SQL: how a row is made ready, what a refused move means, what a page is. The shared suite of `tests/store` runs on it as
on the others.
Nothing here awaits; `door.py` makes a `saga.ports.Store` of it.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from saga.audit import IN_PROCESS, AuditEntries, AuditEntry, AuditFilter, NewAuditEntry, Requester
from saga.errors import Conflict, RowRejected
from saga.model import EventType, Saga, SagaEvent, SagaStatus, StepAction, StepLog, StepStatus
from saga.ports import (
    Claimed,
    Clock,
    Created,
    NewSaga,
    Page,
    Record,
    Recorded,
    Registered,
    SagaFilter,
    SchemaState,
    UndoDebt,
)
from saga.workflow import Workflow, WorkflowDefinition, decode_definition, encode_definition
from store import audit_rows, rows
from store.cloudevents import OutboxEvent
from store.outbox import Backlog, DeadMessage, Settled, fair_share
from store.rows import CreateRow, LogRow, MoveRow

WIDTH = 255
LARGEST = 2**31 - 1


PARTITIONS = 16


class Announced(msgspec.Struct, frozen=True):
    """A row of the outbox."""

    number: int
    saga_id: str
    event: SagaEvent
    created_at: datetime

    @property
    def event_id(self) -> str:
        return str(uuid.UUID(int=self.number))

    @property
    def partition(self) -> int:
        return int(self.saga_id[-2:], 16) % PARTITIONS


class Logged(msgspec.Struct, frozen=True):
    """A row of the step log; its payloads are JSON text, as in a database."""

    log_id: str
    entry: Any
    payloads: LogRow


class Tables:
    """All tables of one database. Every method is one transaction."""

    def __init__(self, clock: Clock, *, events: bool = True) -> None:
        self._clock = clock
        self._events = events
        self.sagas: dict[str, Saga] = {}
        self.logs: dict[str, list[Logged]] = {}
        self.outbox: dict[str, list[Announced]] = {}
        self.audit: list[AuditEntry] = []
        self.leases: dict[str, datetime] = {}
        self.unpublished: list[dict[int, Announced]] = [{} for _ in range(PARTITIONS)]
        self.dead: dict[tuple[int, str], DeadMessage] = {}
        self.removed: set[int] = set()
        self.undo_since: dict[str, datetime] = {}
        self._relays: dict[str, datetime] = {}
        self._relay_of: list[str | None] = [None] * PARTITIONS
        self._definitions: dict[str, list[str]] = {}
        self._decoded: dict[str, WorkflowDefinition] = {}
        self._keys: dict[str, str] = {}
        self._requests: dict[str, tuple[str | None, str | None]] = {}
        # The two indexes of open sagas: those nobody owns, and those of each owner. Dicts, for they keep their order.
        self._free: dict[str, None] = {}
        self._owned: dict[str, dict[str, None]] = {}
        self._numbers = 0

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _put(self, saga: Saga) -> None:
        """Writes a row and keeps the indexes."""
        saga_id = saga.saga_id
        before = self.sagas.get(saga_id)
        self.sagas[saga_id] = saga
        is_open = not saga.status.is_terminal
        if before is not None and not before.status.is_terminal:
            if is_open and before.owner == saga.owner:
                return
            if before.owner is None:
                del self._free[saga_id]
            else:
                del self._owned[before.owner][saga_id]
        if is_open:
            if saga.owner is None:
                self._free[saga_id] = None
            else:
                self._owned.setdefault(saga.owner, {})[saga_id] = None

    # --- creations and moves -----------------------------------------------------------------------------------------

    def write_batch(self, batch: Sequence[CreateRow | MoveRow]) -> list[Created | Recorded | Exception]:
        return [self._create(row) if isinstance(row, CreateRow) else self._record(row) for row in batch]

    def _create(self, row: CreateRow) -> Created | Exception:
        new = row.new
        texts = (new.workflow_name, new.correlation_id, new.initiated_by, new.idempotency_key, new.owner)
        if any(text is not None and len(text) > WIDTH for text in texts) or not 1 <= new.workflow_version <= LARGEST:
            return RowRejected(f"saga {new.saga_id}: against a check of the table")
        refused = self._refused_create(new)
        if refused is not None:
            return refused
        saga = rows.new_saga_as_stored(new, self._clock.now())
        self._put(saga)
        self.logs[saga.saga_id] = []
        self.outbox[saga.saga_id] = []
        self._requests[saga.saga_id] = (new.idempotency_key, new.request_digest)
        if new.idempotency_key is not None:
            self._keys[new.idempotency_key] = saga.saga_id
        self._announce(
            saga.saga_id, SagaEvent(event_type=EventType.SAGA_STARTED, status=SagaStatus.STARTED, current_step=0)
        )
        self._enter(audit_rows.start_entry(saga, new.asked_by))
        return Created(saga=saga)

    def _refused_create(self, new: NewSaga) -> Created | Conflict | None:
        there = self.sagas.get(new.saga_id)
        if there is not None:
            same = (there.workflow_name, there.payload) == (new.workflow_name, new.payload)
            if same and self._requests[new.saga_id] == (new.idempotency_key, new.request_digest):
                return Created(saga=there)
            return Conflict(f"saga {new.saga_id} exists with other content")
        earlier = None if new.idempotency_key is None else self._keys.get(new.idempotency_key)
        if earlier is None:
            return None
        if self._requests[earlier][1] == new.request_digest:
            return Created(saga=self.sagas[earlier], replayed=True)
        return Conflict(f"idempotency key {new.idempotency_key!r} was used with another request")

    def _record(self, row: MoveRow) -> Recorded | Exception:
        record = row.record
        if (reason := _against_a_check(record)) is not None:
            return RowRejected(f"saga {record.before.saga_id}: {reason}")
        stored = self.sagas.get(record.before.saga_id)
        if stored is None or not self.fence_holds(stored, record):
            return rows.judge_refused_move(row, stored)
        now = self._clock.now()
        after = record.after
        waits = not (after.status is SagaStatus.RUNNING and stored.cancel_requested)
        landed = {
            "updated_at": now,
            "next_attempt_at": _later(now, record.retry_in_secs) if waits else None,
            "deadline_at": _later(now, record.deadline_in_secs) or stored.deadline_at,
            "cancel_requested": stored.cancel_requested,
        }
        recorded = rows.moved_saga(row, landed, _as_it_is)
        self._put(recorded.saga)
        if after.status is SagaStatus.COMPENSATING or after.undo_failed:
            self.undo_since.setdefault(stored.saga_id, now)
        else:
            self.undo_since.pop(stored.saga_id, None)
        for entry, payloads in zip(record.logs, row.logs, strict=True):
            self.logs[stored.saga_id].append(Logged(str(uuid.UUID(int=self._number())), entry, payloads))
        for event in record.events:
            self._announce(stored.saga_id, event)
        for asked in record.audit:
            self._enter(asked)
        return recorded

    @staticmethod
    def fence_holds(stored: Saga, record: Record) -> bool:
        """Whether the row is still the one the move was decided from, and no cancel request bars it."""
        before = record.before
        if (stored.owner, stored.epoch, stored.revision) != (before.owner, before.epoch, before.revision):
            return False
        ends = record.after.status in (SagaStatus.COMPLETED, SagaStatus.FAILED)
        return not (ends and stored.cancel_requested)

    def _announce(self, saga_id: str, event: SagaEvent) -> None:
        if self._events:
            announced = Announced(self._number(), saga_id, event, self._clock.now())
            self.outbox[saga_id].append(announced)
            self.unpublished[announced.partition][announced.number] = announced

    def _enter(self, entry: NewAuditEntry) -> None:
        self.audit.append(AuditEntry(number=self._number(), created_at=self._clock.now(), entered=entry))

    # --- reads -------------------------------------------------------------------------------------------------------

    def get(self, saga_id: str) -> Saga | None:
        return self.sagas.get(saga_id)

    def step_logs(self, saga_id: str) -> list[StepLog]:
        return [_step_log(saga_id, logged) for logged in self.logs.get(saga_id, ())]

    def list_sagas(self, where: SagaFilter, limit: int, offset: int, after: tuple[datetime, str] | None) -> Page:
        found = [saga for saga in self.sagas.values() if _passes(saga, where)]
        total = len(found)
        found.sort(key=lambda saga: (saga.created_at, saga.saga_id), reverse=True)
        if after is not None:
            found = [saga for saga in found if (saga.created_at, saga.saga_id) < after]
            offset = 0
        return rows.page(found[offset : offset + limit + 1], limit, total)

    def cancel_requests(self, worker_id: str) -> list[str]:
        begun = (SagaStatus.STARTED, SagaStatus.RUNNING)
        owned = (self.sagas[saga_id] for saga_id in self._owned.get(worker_id, ()))
        return [saga.saga_id for saga in owned if saga.cancel_requested and saga.status in begun]

    def count_open(self) -> dict[SagaStatus, int]:
        counts: dict[SagaStatus, int] = {}
        for ids in (self._free, *self._owned.values()):
            for saga_id in ids:
                status = self.sagas[saga_id].status
                counts[status] = counts.get(status, 0) + 1
        return counts

    def list_audit(self, where: AuditFilter, limit: int, after: tuple[datetime, int] | None) -> AuditEntries:
        found = [entry for entry in self.audit if _entry_passes(entry, where)]
        found.sort(key=lambda entry: (entry.created_at, entry.number), reverse=True)
        if after is not None:
            found = [entry for entry in found if (entry.created_at, entry.number) < after]
        return audit_rows.stretch(found[: limit + 1], limit)

    def undo_debt(self) -> list[UndoDebt]:
        owed: dict[str, list[int]] = {}
        since: dict[str, datetime] = {}
        for saga_id, at in self.undo_since.items():
            saga = self.sagas[saga_id]
            workflow = self.workflow(saga.workflow_name, saga.workflow_version)
            pending = [
                index
                for index in saga.undo_plan
                if workflow is None or workflow.definition.steps[index].compensate is not None
            ]
            sums = owed.setdefault(saga.workflow_name, [0, 0])
            sums[0] += len(saga.undo_failed)
            sums[1] += len(pending)
            since[saga.workflow_name] = min(at, since.get(saga.workflow_name, at))
        now = self._clock.now()
        return [
            UndoDebt(
                workflow_name=name,
                failed=failed,
                pending=pending,
                oldest_secs=max(0.0, (now - since[name]).total_seconds()),
            )
            for name, (failed, pending) in sorted(owed.items())
        ]

    def schema_state(self) -> SchemaState:
        return SchemaState.CURRENT

    def ping(self) -> None:
        """It is there."""

    # --- single writes -----------------------------------------------------------------------------------------------

    def request_cancel_unless_terminal(
        self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None
    ) -> Saga | None:
        saga = self.sagas.get(saga_id)
        if saga is not None and not saga.status.is_terminal:
            waits_until = saga.next_attempt_at if saga.status is SagaStatus.COMPENSATING else None
            saga = msgspec.structs.replace(
                saga, cancel_requested=True, next_attempt_at=waits_until, updated_at=self._clock.now()
            )
            self._put(saga)
            self._enter(audit_rows.cancel_entry(saga, asked_by, reason))
        return saga

    def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]:
        if not self._free:
            return []
        now = self._clock.now()
        free = (self.sagas[saga_id] for saga_id in self._free)
        due = [saga for saga in free if saga.next_attempt_at is None or saga.next_attempt_at <= now]
        due.sort(key=lambda saga: (saga.created_at, saga.saga_id))
        claimed = []
        for saga in due[:limit]:
            taken = msgspec.structs.replace(saga, owner=worker_id, epoch=saga.epoch + 1, updated_at=now)
            self._put(taken)
            deadline = taken.deadline_at
            claimed.append(
                Claimed(
                    saga=taken,
                    deadline_in_secs=None if deadline is None else (deadline - now).total_seconds(),
                    responses=self._responses(taken.saga_id),
                )
            )
        return claimed

    def _responses(self, saga_id: str) -> dict[str, Any]:
        return {
            logged.entry.step_name: {}
            if logged.payloads.response_payload is None
            else msgspec.json.decode(logged.payloads.response_payload)
            for logged in self.logs[saga_id]
            if logged.entry.action is StepAction.EXECUTE and logged.entry.status is StepStatus.SUCCESS
        }

    def release(self, saga: Saga, interrupted: bool, retry_in_secs: float | None) -> bool:
        stored = self.sagas.get(saga.saga_id)
        if stored is None or stored.status.is_terminal or (stored.owner, stored.epoch) != (saga.owner, saga.epoch):
            return False
        now = self._clock.now()
        self._put(
            msgspec.structs.replace(
                stored,
                owner=None,
                outcome_unknown=stored.outcome_unknown or interrupted,
                next_attempt_at=_later(now, retry_in_secs) or stored.next_attempt_at,
                updated_at=now,
            )
        )
        return True

    def register_worker(self, worker_id: str, lease_secs: float) -> None:
        self.leases[worker_id] = self._clock.now() + timedelta(seconds=lease_secs)

    def renew_lease(self, worker_id: str, lease_secs: float) -> bool:
        now = self._clock.now()
        until = self.leases.get(worker_id)
        if until is None or until < now:
            return False
        self.leases[worker_id] = now + timedelta(seconds=lease_secs)
        return True

    def release_expired_workers(self) -> int:
        now = self._clock.now()
        for worker_id in [worker_id for worker_id, until in self.leases.items() if until < now]:
            del self.leases[worker_id]
        abandoned = [owner for owner in self._owned if owner not in self.leases]
        freed = sum(self._free_all(list(self._owned[owner])) for owner in abandoned)
        for owner in abandoned:
            del self._owned[owner]
        return freed

    def owned(self, worker_id: str) -> list[Saga]:
        return [self.sagas[saga_id] for saga_id in self._owned.get(worker_id, ())]

    def remove_worker(self, worker_id: str) -> None:
        self._free_all(list(self._owned.get(worker_id, ())))
        self.leases.pop(worker_id, None)

    def remove_ended_before(self, age_secs: float, limit: int) -> int:
        before = self._clock.now() - timedelta(seconds=age_secs)
        # Nothing changes a saga that is over but being reopened, so its last change is its end.
        over = [saga for saga in self.sagas.values() if saga.status.is_terminal and saga.updated_at < before]
        published = sorted((saga.updated_at, saga.saga_id) for saga in over if self._is_published(saga.saga_id))
        for _, saga_id in published[:limit]:
            self._delete(saga_id)
        return len(published[:limit])

    def _free_all(self, saga_ids: list[str]) -> int:
        now = self._clock.now()
        for saga_id in saga_ids:
            saga = self.sagas[saga_id]
            unknown = saga.outcome_unknown or saga.status is SagaStatus.RUNNING
            self._put(msgspec.structs.replace(saga, owner=None, outcome_unknown=unknown, updated_at=now))
        return len(saga_ids)

    # --- the outbox, for a relay -------------------------------------------------------------------------------------

    def take_share(self, relay_id: str, lease_secs: float) -> int:
        now = self._clock.now()
        self.keep_relay(relay_id, lease_secs)
        self._relays = {relay: until for relay, until in self._relays.items() if until >= now}
        self._relay_of = [relay if relay in self._relays else None for relay in self._relay_of]
        take, give_up = map(list, fair_share(relay_id, list(enumerate(self._relay_of)), len(self._relays)))
        for partition in give_up:
            self._relay_of[partition] = None
        for partition in take:
            self._relay_of[partition] = relay_id
        return self._relay_of.count(relay_id)

    def keep_relay(self, relay_id: str, lease_secs: float) -> None:
        self._relays[relay_id] = self._clock.now() + timedelta(seconds=lease_secs)

    def remove_relay(self, relay_id: str) -> None:
        self._relays.pop(relay_id, None)
        self._relay_of = [None if relay == relay_id else relay for relay in self._relay_of]

    def pending(self, relay_id: str, limit: int, max_bytes: int) -> list[OutboxEvent]:
        found = self._waiting_for(relay_id)[:limit]
        events: list[OutboxEvent] = []
        size = 0
        for announced in found:
            events.append(self._message(announced))
            size += len(events[-1].payload)
            if size > max_bytes:
                break
        return events

    def _waiting_for(self, relay_id: str) -> list[Announced]:
        partitions = zip(self.unpublished, self._relay_of, strict=True)
        found = [announced for waiting, relay in partitions if relay == relay_id for announced in waiting.values()]
        found.sort(key=lambda announced: announced.number)
        return found

    def _message(self, announced: Announced) -> OutboxEvent:
        saga, event = self.sagas[announced.saga_id], announced.event
        return OutboxEvent(
            id=announced.number,
            event_id=announced.event_id,
            saga_id=saga.saga_id,
            event_type=event.event_type.value,
            status=event.status.value,
            current_step=event.current_step,
            error_message=event.error_message,
            created_at=announced.created_at,
            workflow_name=saga.workflow_name,
            workflow_version=saga.workflow_version,
            correlation_id=saga.correlation_id,
            initiated_by=saga.initiated_by,
            payload=msgspec.json.encode(saga.payload).decode(),
        )

    def settle(self, settled: Settled) -> None:
        for dead in settled.dead:
            self.dead.setdefault((dead.id, dead.topic), dead)
        self.removed.update(settled.removed)
        for number in (*settled.published, *settled.removed):
            for waiting in self.unpublished:
                if waiting.pop(number, None) is not None:
                    break

    def backlog(self, relay_id: str) -> Backlog:
        found = self._waiting_for(relay_id)
        oldest_secs = (self._clock.now() - found[0].created_at).total_seconds() if found else 0.0
        return Backlog(pending=len(found), oldest_secs=oldest_secs)

    def publish_all(self, saga_id: str) -> None:
        """What a relay leaves behind once the announcements of a saga are acknowledged."""
        self.settle(Settled(published=tuple(announced.number for announced in self.outbox[saga_id])))

    def _is_published(self, saga_id: str) -> bool:
        return not any(one.number in self.unpublished[one.partition] for one in self.outbox[saga_id])

    # --- workflows ---------------------------------------------------------------------------------------------------

    def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered:
        versions = self._definitions.setdefault(definition.name, [])
        text = encode_definition(definition)
        changed = not versions or versions[-1] != text
        if changed:
            versions.append(text)
            self._enter(audit_rows.registration_entry(definition.name, len(versions), asked_by))
        return Registered(version=len(versions), changed=changed)

    def workflow(self, name: str, version: int | None) -> Workflow | None:
        versions = self._definitions.get(name, [])
        number = len(versions) if version is None else version
        if not 1 <= number <= len(versions):
            return None
        text = versions[number - 1]
        if text not in self._decoded:
            self._decoded[text] = decode_definition(text)
        return Workflow(definition=self._decoded[text], version=number)

    def workflows(self) -> list[Workflow]:
        found = (self.workflow(name, None) for name in sorted(self._definitions))
        return [workflow for workflow in found if workflow is not None]

    # --- the audit log -----------------------------------------------------------------------------------------------

    def add_audit_entry(self, entry: NewAuditEntry) -> None:
        self._enter(entry)

    def remove_audit_before(self, age_secs: float, limit: int) -> int:
        before = self._clock.now() - timedelta(seconds=age_secs)
        old = sorted((entry.created_at, entry.number) for entry in self.audit if entry.created_at < before)
        removed = {number for _, number in old[:limit]}
        self.audit = [entry for entry in self.audit if entry.number not in removed]
        return len(removed)

    # --- past the port -----------------------------------------------------------------------------------------------

    def ask(self, sql: str, *arguments: str) -> list[tuple[Any, ...]]:
        """Answers what the shared suite asks of the tables in SQL, on a copy; a deletion is carried over."""
        with sqlite3.connect(":memory:", isolation_level=None) as copy:
            copy.executescript(
                """
                PRAGMA foreign_keys = ON;
                CREATE TABLE saga_states (id TEXT PRIMARY KEY);
                CREATE TABLE saga_step_logs (saga_id TEXT REFERENCES saga_states ON DELETE CASCADE);
                CREATE TABLE outbox (
                    id INTEGER PRIMARY KEY, saga_id TEXT REFERENCES saga_states ON DELETE CASCADE, event_type TEXT,
                    status TEXT, current_step INTEGER, error_message TEXT, published_at TEXT
                );
                """
            )
            for saga_id in self.sagas:
                copy.execute("INSERT INTO saga_states VALUES (?)", [saga_id])
                copy.executemany("INSERT INTO saga_step_logs VALUES (?)", [[saga_id] for _ in self.logs[saga_id]])
                for row in self.outbox[saga_id]:
                    event = row.event
                    values = [row.number, saga_id, event.event_type.value, event.status.value, event.current_step]
                    copy.execute("INSERT INTO outbox VALUES (?, ?, ?, ?, ?, ?, NULL)", [*values, event.error_message])
            answer = [tuple(row) for row in copy.execute(sql, arguments).fetchall()]
            left = {row[0] for row in copy.execute("SELECT id FROM saga_states")}
        copy.close()
        for saga_id in set(self.sagas) - left:
            self._delete(saga_id)
        return answer

    def _delete(self, saga_id: str) -> None:
        saga = self.sagas.pop(saga_id)
        self.undo_since.pop(saga_id, None)
        self._free.pop(saga_id, None)
        if saga.owner is not None:
            self._owned.get(saga.owner, {}).pop(saga_id, None)
        key, _ = self._requests.pop(saga_id)
        if key is not None:
            del self._keys[key]
        self.publish_all(saga_id)
        del self.logs[saga_id], self.outbox[saga_id]


def _against_a_check(record: Record) -> str | None:
    """Why no table takes such a row; None: it does."""
    after = record.after
    if not all(0 <= number <= LARGEST for number in (after.current_step, after.attempt, after.epoch)):
        return "a counter is out of range"
    if after.error_message is not None and not _is_text(after.error_message):
        return "error_message is no text"
    for entry in record.logs:
        if len(entry.step_name) > WIDTH or not 0 <= entry.step_index <= LARGEST:
            return "a step log is out of range"
        if entry.error_message is not None and not _is_text(entry.error_message):
            return "error_message is no text"
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_it_is(instant: Any) -> datetime | None:
    found: datetime | None = instant
    return found


def _later(now: datetime, secs: float | None) -> datetime | None:
    return None if secs is None else now + timedelta(seconds=secs)


def _passes(saga: Saga, where: SagaFilter) -> bool:
    return (
        where.workflow_name in (None, saga.workflow_name)
        and where.status in (None, saga.status)
        and where.correlation_id in (None, saga.correlation_id)
        and where.compensation_failed in (None, saga.compensation_failed)
        and (where.created_after is None or saga.created_at >= where.created_after)
        and (where.created_before is None or saga.created_at < where.created_before)
    )


def _entry_passes(entry: AuditEntry, where: AuditFilter) -> bool:
    entered = entry.entered
    return (
        where.saga_id in (None, entered.saga_id)
        and where.principal in (None, entered.asked_by.principal)
        and where.action in (None, entered.action)
        and (where.created_after is None or entry.created_at >= where.created_after)
        and (where.created_before is None or entry.created_at < where.created_before)
    )


def _step_log(saga_id: str, logged: Logged) -> StepLog:
    request, response = logged.payloads.request_payload, logged.payloads.response_payload
    return StepLog(
        id=logged.log_id,
        saga_id=saga_id,
        request_payload=None if request is None else msgspec.json.decode(request),
        response_payload=None if response is None else msgspec.json.decode(response),
        **{
            name: getattr(logged.entry, name)
            for name in logged.entry.__struct_fields__
            if name not in ("request_payload", "response_payload")
        },
    )
