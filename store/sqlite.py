"""The embedded store: one process, one SQLite file (or none: `:memory:`), the standard library's driver.

`_Database` is everything that is said to SQLite, blocking, on one connection. `SqliteStore` keeps the port over it in
one of two ways. A file: writes share transactions in a lane and run, one at a time, in a worker thread; reads have a
connection of their own. Memory: everything runs at once in the calling task, without a thread, so that the engine can
be tested under Trio's virtual clock. The durability of the file is SQLite's: WAL with synchronous=FULL.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, cast

import msgspec
import trio

from saga.audit import IN_PROCESS, AuditEntries, AuditFilter, NewAuditEntry, Requester
from saga.errors import Conflict, RowRejected, Unavailable
from saga.model import EventType, Saga, SagaEvent, SagaStatus, StepLog
from saga.ports import (
    Claimed,
    Clock,
    Created,
    NewSaga,
    Notice,
    Page,
    Record,
    Recorded,
    Registered,
    SagaFilter,
    SchemaState,
    UndoDebt,
)
from saga.saga_id import canonical_saga_id
from saga.workflow import Workflow, WorkflowDefinition, encode_definition
from store import audit_rows, rows, sqlite_migrations
from store.cloudevents import OutboxEvent
from store.errors import StoreInUse
from store.group_commit import Lane
from store.instants import SystemClock, after_secs, from_text, seconds_between, to_text
from store.outbox import Backlog, Bell, Settled
from store.queries import Dialect, Query, load
from store.rows import CreateRow, MoveRow
from store.write_health import WriteHealth

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MEMORY = ":memory:"
OLDEST_SQLITE = (3, 37, 0)
"""STRICT tables; RETURNING (3.35) is older."""

BUSY_TIMEOUT_MS = 5000
"""How long a connection waits for another's lock. Only the CLI's status and backups can hold one; a guess."""

COUNTED = 100_000
"""Pending events counted at most: the count is for people and is taken every few seconds."""

_Q = load(Dialect.SQLITE)
_BATCH_ROW = CreateRow | MoveRow
_BATCH_RESULT = Created | Recorded

# What SQLite, or the driver on the way to it, says of content; everything else it says is about the database.
_CONTENT_ERRORS = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError)


def _instant(text: str | None) -> datetime | None:
    return None if text is None else from_text(text)


def _text(instant: datetime | None) -> str | None:
    return None if instant is None else to_text(instant)


class _Database:
    """One connection and what is said over it. Not for two threads at a time."""

    def __init__(self, connection: sqlite3.Connection, clock: Clock, events: bool) -> None:
        self._connection = connection
        self._clock = clock
        self._events = events
        self._last_created_at: datetime | None = None
        connection.create_function("clock_timestamp", 0, lambda: to_text(clock.now()))
        connection.create_function("after_secs", 2, after_secs, deterministic=True)
        connection.create_function("seconds_between", 2, seconds_between, deterministic=True)

    def close(self) -> None:
        self._connection.close()

    def _run(self, query: Query, **parameters: object) -> list[sqlite3.Row]:
        assert parameters.keys() == set(query.parameters), query.name  # every method has a case in tests/store
        return self._connection.execute(query.text, parameters).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE: a transaction that read first and then wants to write could be refused in the middle.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    # --- the lane's work ----------------------------------------------------------------------------------------------

    def write_batch(self, batch: Sequence[_BATCH_ROW]) -> list[_BATCH_RESULT | Exception]:
        """Writes the rows in one transaction. A row that is refused for its content makes it start over with a
        savepoint for each, which costs too much for every day."""
        with translated_sqlite():
            try:
                with self._transaction():
                    return [self._write_row(row) for row in batch]
            except _CONTENT_ERRORS:
                with self._transaction():
                    return [self._write_row_or_rejection(row) for row in batch]

    def _write_row_or_rejection(self, row: _BATCH_ROW) -> _BATCH_RESULT | Exception:
        self._connection.execute("SAVEPOINT one_row")
        try:
            result = self._write_row(row)
        except _CONTENT_ERRORS as error:
            self._connection.execute("ROLLBACK TO one_row")
            saga_id = row.new.saga_id if isinstance(row, CreateRow) else row.record.before.saga_id
            rejected = RowRejected(f"saga {saga_id}: the database refuses the row: {error}")
            rejected.__cause__ = error
            return rejected
        finally:
            self._connection.execute("RELEASE one_row")
        return result

    def _write_row(self, row: _BATCH_ROW) -> _BATCH_RESULT | Exception:
        return self._create(row) if isinstance(row, CreateRow) else self._record(row)

    def _create(self, row: CreateRow) -> Created | Conflict:
        new = row.new
        created_at = self._next_created_at()
        cursor = self._connection.execute(
            _Q["create_saga"].text,
            {
                "saga_id": new.saga_id,
                "workflow_name": new.workflow_name,
                "workflow_version": new.workflow_version,
                "payload": row.payload,
                "correlation_id": new.correlation_id,
                "initiated_by": new.initiated_by,
                "idempotency_key": new.idempotency_key,
                "request_digest": new.request_digest,
                "traceparent": new.traceparent,
                "tracestate": new.tracestate,
                "owner": new.owner,
                "epoch": rows.first_epoch(new),
                "created_at": to_text(created_at),
            },
        )
        if cursor.rowcount == 0:
            earlier = self._run(
                _Q["sagas_made_earlier"],
                saga_ids=_array([new.saga_id]),
                idempotency_keys=_array([new.idempotency_key]),
            )
            judged = rows.judge_refused_create(new, cast("list[rows.Row]", earlier), _instant)
            assert judged is not None  # what refused it is in the way still: there is one writer
            return judged
        if self._events:
            self._announce(
                new.saga_id,
                SagaEvent(event_type=EventType.SAGA_STARTED, status=SagaStatus.STARTED, current_step=0),
            )
        saga = rows.new_saga_as_stored(new, created_at)
        self._enter(audit_rows.start_entry(saga, new.asked_by), created_at)
        return Created(saga=saga)

    def _next_created_at(self) -> datetime:
        """Now, but behind every earlier saga's: what is created later is claimed later, whatever the clock does."""
        if self._last_created_at is None:
            newest = self._connection.execute(_Q["newest_created_at"].text).fetchone()[0]
            self._last_created_at = _instant(newest)
        now = self._clock.now()
        if self._last_created_at is not None and now <= self._last_created_at:
            now = self._last_created_at + timedelta(microseconds=1)
        self._last_created_at = now
        return now

    def _record(self, row: MoveRow) -> Recorded | Exception:
        record = row.record
        before, after = record.before, record.after
        now = self._clock.now()
        # fetchone on a RETURNING statement leaves it open; fetchall ends it, as a COMMIT needs.
        landed = self._connection.execute(
            _Q["record_move"].text,
            {
                "saga_id": before.saga_id,
                "owner_before": before.owner,
                "epoch_before": before.epoch,
                "revision_before": before.revision,
                "status": after.status.value,
                "current_step": after.current_step,
                "error_message": after.error_message,
                "compensation_failed": after.compensation_failed,
                "attempt": after.attempt,
                "next_attempt_at": _later(now, record.retry_in_secs),
                "deadline_at": _later(now, record.deadline_in_secs),
                "outcome_unknown": after.outcome_unknown,
                "undo_plan": row.undo_plan,
                "undo_failed": row.undo_failed,
                "undo_corrections": row.undo_corrections,
                "owner": row.owner,
                "epoch": after.epoch,
                "updated_at": to_text(now),
            },
        ).fetchall()
        if not landed:
            return rows.judge_refused_move(row, self.get(before.saga_id))
        for entry, payloads in zip(record.logs, row.logs, strict=True):
            self._connection.execute(
                _Q["add_step_log"].text,
                {
                    "id": str(uuid.uuid4()),
                    "saga_id": before.saga_id,
                    "step_index": entry.step_index,
                    "step_name": entry.step_name,
                    "action": entry.action.value,
                    "status": entry.status.value,
                    "request_payload": payloads.request_payload,
                    "response_payload": payloads.response_payload,
                    "error_message": entry.error_message,
                    "started_at": to_text(entry.started_at),
                    "completed_at": to_text(entry.completed_at),
                    "attempts": entry.attempts,
                },
            )
        if self._events:
            for event in record.events:
                self._announce(before.saga_id, event)
        for asked in record.audit:
            self._enter(asked, now)
        return rows.moved_saga(row, landed[0], _instant)

    def _enter(self, entry: NewAuditEntry, now: datetime | None = None) -> None:
        self._run(_Q["add_audit_entry"], **audit_rows.entry_parameters(entry), now=_text(now))

    def _announce(self, saga_id: str, event: SagaEvent) -> None:
        self._run(
            _Q["add_event"],
            event_id=str(uuid.uuid4()),
            saga_id=saga_id,
            event_type=event.event_type.value,
            status=event.status.value,
            current_step=event.current_step,
            error_message=event.error_message,
        )

    # --- reads --------------------------------------------------------------------------------------------------------

    def get(self, saga_id: str) -> Saga | None:
        found = self._run(_Q["sagas_by_ids"], saga_ids=_array([saga_id]))
        return rows.saga_from_row(_row(found[0]), _instant) if found else None

    def step_logs(self, saga_id: str) -> list[StepLog]:
        return [rows.step_log_from_row(_row(row), _instant) for row in self._run(_Q["step_logs"], saga_id=saga_id)]

    def list_sagas(self, where: SagaFilter, limit: int, offset: int, after: tuple[datetime, str] | None) -> Page:
        filters = rows.filter_parameters(where)
        filters["created_after"] = _text(where.created_after)
        filters["created_before"] = _text(where.created_before)
        total = self._run(_Q["count_sagas"], **filters)[0]["total"]
        found = self._run(
            _Q["list_sagas"],
            **filters,
            after_created_at=None if after is None else to_text(after[0]),
            after_id=None if after is None else after[1],
            limit=limit + 1,
            offset=0 if after is not None else offset,
        )
        return rows.page([rows.saga_from_row(_row(row), _instant) for row in found], limit, total)

    def workflow(self, name: str, version: int | None) -> Workflow | None:
        found = self._run(_Q["workflow"], name=name, version=version)
        return rows.workflow_from_row(_row(found[0])) if found else None

    def workflows(self) -> list[Workflow]:
        return [rows.workflow_from_row(_row(row)) for row in self._run(_Q["workflows"])]

    def count_open(self) -> dict[SagaStatus, int]:
        return {SagaStatus(row["status"]): row["total"] for row in self._run(_Q["count_open_sagas"])}

    def list_audit(self, where: AuditFilter, limit: int, after: tuple[datetime, int] | None) -> AuditEntries:
        filters = audit_rows.filter_parameters(where)
        filters["created_after"] = _text(where.created_after)
        filters["created_before"] = _text(where.created_before)
        found = self._run(
            _Q["list_audit"] if where.saga_id is None else _Q["list_audit_of_saga"],
            **filters,
            after_created_at=None if after is None else to_text(after[0]),
            after_id=None if after is None else after[1],
            limit=limit + 1,
        )
        return audit_rows.stretch([audit_rows.entry_from_row(_row(row), _instant) for row in found], limit)

    def undo_debt(self) -> list[UndoDebt]:
        return [rows.undo_debt_from_row(_row(row)) for row in self._run(_Q["undo_debt"], now=None)]

    def schema_state(self) -> SchemaState:
        return sqlite_migrations.schema_state(self._connection)

    def cancel_requests(self, worker_id: str) -> list[str]:
        return [row["id"] for row in self._run(_Q["cancel_requests_of_worker"], worker_id=worker_id)]

    def owned(self, worker_id: str) -> list[Saga]:
        found = self._run(_Q["open_sagas_of_worker"], worker_id=worker_id)
        return [rows.saga_from_row(_row(row), _instant) for row in found]

    def ping(self) -> None:
        self._run(_Q["ping"])

    def pending_events(self, relay_id: str, limit: int, max_bytes: int) -> list[OutboxEvent]:
        # Row by row: each may carry a payload of a mebibyte or more.
        cursor = self._connection.execute(_Q["pending_events"].text, {"relay_id": relay_id, "limit": limit})
        events: list[OutboxEvent] = []
        fetched_bytes = 0
        try:
            while fetched_bytes <= max_bytes and (row := cursor.fetchone()) is not None:
                events.append(_event(row))
                fetched_bytes += len(events[-1].payload)
        finally:
            cursor.close()
        return events

    def outbox_backlog(self, relay_id: str) -> Backlog:
        (row,) = self._run(_Q["outbox_backlog"], relay_id=relay_id, limit=COUNTED, now=None)
        return Backlog(pending=row["pending"], oldest_secs=row["oldest_secs"] or 0.0)

    # --- single writes ------------------------------------------------------------------------------------------------

    def settle_events(self, settled: Settled) -> None:
        with self._transaction():
            for event_id in settled.published:
                self._run(_Q["mark_event_published"], id=event_id)
            for dead in settled.dead:
                self._run(
                    _Q["add_dead_message"], id=dead.id, topic=dead.topic, message=dead.message, reason=dead.reason
                )
            for event_id in settled.removed:
                self._run(_Q["remove_event"], id=event_id)

    def request_cancel_unless_terminal(self, saga_id: str, asked_by: Requester = IN_PROCESS) -> Saga | None:
        with self._transaction():
            found = self._run(_Q["request_cancel_unless_terminal"], saga_id=saga_id)
            if not found:
                return self.get(saga_id)
            marked = rows.saga_from_row(_row(found[0]), _instant)
            self._enter(audit_rows.cancel_entry(marked, asked_by))
            return marked

    def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]:
        with self._transaction():
            taken = self._run(
                _Q["claim_due_sagas"], worker_id=worker_id, limit=limit, now=None, claim_id=None, lost_claim_ids=None
            )
        claimed = [rows.claimed_from_row(_row(row), _instant) for row in taken]
        return sorted(claimed, key=lambda one: (one.saga.created_at, one.saga.saga_id))

    def release(self, saga: Saga, interrupted: bool, retry_in_secs: float | None) -> bool:
        with self._transaction():
            return bool(
                self._run(
                    _Q["release_if_owned"],
                    saga_id=saga.saga_id,
                    owner=saga.owner,
                    epoch=saga.epoch,
                    interrupted=interrupted,
                    retry_in_secs=retry_in_secs,
                    now=None,
                )
            )

    def register_worker(self, worker_id: str, lease_secs: float) -> None:
        with self._transaction():
            self._run(_Q["register_worker"], worker_id=worker_id, lease_secs=lease_secs, now=None)

    def renew_lease(self, worker_id: str, lease_secs: float) -> bool:
        with self._transaction():
            return bool(self._run(_Q["renew_lease_unless_ended"], worker_id=worker_id, lease_secs=lease_secs, now=None))

    def release_expired_workers(self) -> int:
        with self._transaction():
            self._run(_Q["remove_expired_workers"], now=None)
            return len(self._run(_Q["free_abandoned_sagas"]))

    def remove_worker(self, worker_id: str) -> None:
        with self._transaction():
            self._run(_Q["free_sagas_of_worker"], worker_id=worker_id)
            self._run(_Q["remove_worker"], worker_id=worker_id)

    def remove_all_workers(self) -> None:
        with self._transaction():
            self._run(_Q["remove_all_workers"])

    def remove_ended_before(self, age_secs: float, limit: int) -> int:
        with self._transaction():
            return len(self._run(_Q["remove_ended_sagas"], age_secs=age_secs, limit=limit, now=None))

    def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered:
        try:
            with self._transaction():
                added = self._run(
                    _Q["register_workflow_if_changed"],
                    name=definition.name,
                    definition=encode_definition(definition),
                    source=source,
                )
                if added:
                    version: int = added[0]["version"]
                    self._enter(audit_rows.registration_entry(definition.name, version, asked_by))
                    return Registered(version=version, changed=True)
                newest = self._run(_Q["workflow"], name=definition.name, version=None)
                return Registered(version=newest[0]["version"], changed=False)
        except _CONTENT_ERRORS as error:
            raise RowRejected(f"workflow {definition.name}: the database refuses the definition: {error}") from error

    def add_audit_entry(self, entry: NewAuditEntry) -> None:
        try:
            with self._transaction():
                self._enter(entry)
        except _CONTENT_ERRORS as error:
            raise RowRejected(f"the database refuses the audit entry: {error}") from error

    def remove_audit_before(self, age_secs: float, limit: int) -> int:
        with self._transaction():
            self._run(_Q["set_audit_removal"], age_secs=age_secs, now=None)
            removed = self._run(_Q["remove_audit_before"], age_secs=age_secs, limit=limit, now=None)
            self._run(_Q["set_audit_removal"], age_secs=None, now=None)
        return len(removed)


def _array(values: Sequence[str | None]) -> str:
    """What json_each() reads as a list."""
    return msgspec.json.encode(values).decode()


def _event(row: sqlite3.Row) -> OutboxEvent:
    return OutboxEvent(
        id=row["id"],
        event_id=row["event_id"],
        saga_id=row["saga_id"],
        event_type=row["event_type"],
        status=row["status"],
        current_step=row["current_step"],
        error_message=row["error_message"],
        created_at=from_text(row["created_at"]),
        workflow_name=row["workflow_name"],
        workflow_version=row["workflow_version"],
        correlation_id=row["correlation_id"],
        initiated_by=row["initiated_by"],
        payload=row["payload"] or "{}",
    )


def _row(row: sqlite3.Row) -> rows.Row:
    """sqlite3.Row is a mapping by column name in all but type."""
    return cast(rows.Row, row)


def _later(now: datetime, secs: float | None) -> str | None:
    return None if secs is None else to_text(now + timedelta(seconds=secs))


@contextmanager
def translated_sqlite() -> Iterator[None]:
    """What SQLite says of the database (locked, full, unreadable) becomes `Unavailable`; what it says of content is
    handled where the row is known; a mistake in our own use of it stays what it is."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        raise Unavailable(f"the embedded database does not answer: {error}") from error


class SqliteStore:
    """Keeps `saga.ports.Store`. Made by `open_sqlite`.

    `lanes`: the group commits, for their counters; none in memory, where every write is a transaction of its own.
    `outbox`: the events it has written, for a relay.
    """

    def __init__(self, writer: _Database, reader: _Database | None) -> None:
        """`reader` None: memory, everything in the calling task on the one connection there is."""
        self._writer = writer
        self._reader = writer if reader is None else reader
        self._inline = reader is None
        # One thread at a time on each connection; readers of one do not wait for the writers of the other.
        self._writing = trio.CapacityLimiter(1)
        self._reading = trio.CapacityLimiter(1)
        self.outbox = SqliteOutbox(self)
        # Apart, because a full disk may leave room for what is changed in place (a lease) and none for what is added.
        self._lane_health, self._write_health = WriteHealth(), WriteHealth()
        self._lane: Lane[_BATCH_ROW, _BATCH_RESULT] | None = None
        if not self._inline:
            self._lane = Lane(self._write_batch, key_of=_saga_id_of)

    @property
    def lanes(self) -> tuple[Lane[Any, Any], ...]:
        return () if self._lane is None else (self._lane,)

    async def _write_batch(self, batch: Sequence[_BATCH_ROW]) -> Sequence[_BATCH_RESULT | Exception]:
        with self._lane_health.watched():
            results = await trio.to_thread.run_sync(self._writer.write_batch, batch, limiter=self._writing)
        self._ring_for(batch)
        return results

    async def _in_lane(self, row: _BATCH_ROW) -> _BATCH_RESULT:
        if self._lane is not None:
            return await self._lane.write(row)
        (result,) = await self._write(self._writer.write_batch, [row])
        self._ring_for([row])
        if isinstance(result, Exception):
            raise result
        return result

    def _ring_for(self, batch: Sequence[_BATCH_ROW]) -> None:
        if any(isinstance(row, CreateRow) or row.record.events for row in batch):
            self.outbox.bell.ring()

    async def _write(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """Runs a write to its end; a cancel comes before it or after it, never between."""
        with self._write_health.watched(), translated_sqlite():
            if not self._inline:
                return await trio.to_thread.run_sync(fn, *args, limiter=self._writing)
            await trio.lowlevel.checkpoint_if_cancelled()
            result = fn(*args)
        # Others run between the write and its caller's next line, as they do on a real disk.
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    async def _read(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        with translated_sqlite():
            if not self._inline:
                return await trio.to_thread.run_sync(fn, *args, limiter=self._reading)
            await trio.lowlevel.checkpoint()
            return fn(*args)

    async def create(self, new: NewSaga) -> Created:
        return cast(Created, await self._in_lane(rows.prepare_create(new)))

    async def record(self, record: Record) -> Recorded:
        return cast(Recorded, await self._in_lane(rows.prepare_move(record)))

    async def get(self, saga_id: str) -> Saga | None:
        known = canonical_saga_id(saga_id)
        return None if known is None else await self._read(self._reader.get, known)

    async def step_logs(self, saga_id: str) -> list[StepLog]:
        known = canonical_saga_id(saga_id)
        return [] if known is None else await self._read(self._reader.step_logs, known)

    async def list_sagas(
        self, where: SagaFilter, *, limit: int, offset: int = 0, after: tuple[datetime, str] | None = None
    ) -> Page:
        return await self._read(self._reader.list_sagas, where, limit, offset, after)

    async def request_cancel_unless_terminal(self, saga_id: str, asked_by: Requester = IN_PROCESS) -> Saga | None:
        known = canonical_saga_id(saga_id)
        if known is None:
            return None
        return await self._write(self._writer.request_cancel_unless_terminal, known, asked_by)

    async def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]:
        return await self._write(self._writer.claim_due_sagas, worker_id, limit)

    async def release(self, saga: Saga, *, interrupted: bool, retry_in_secs: float | None = None) -> bool:
        return await self._write(self._writer.release, saga, interrupted, retry_in_secs)

    async def register_worker(self, worker_id: str, lease_secs: float) -> None:
        await self._write(self._writer.register_worker, worker_id, lease_secs)

    async def renew_lease(self, worker_id: str, lease_secs: float) -> bool:
        return await self._write(self._writer.renew_lease, worker_id, lease_secs)

    async def release_expired_workers(self) -> int:
        return await self._write(self._writer.release_expired_workers)

    async def cancel_requests(self, worker_id: str) -> Sequence[str]:
        return await self._read(self._reader.cancel_requests, worker_id)

    async def owned(self, worker_id: str) -> Sequence[Saga]:
        return await self._read(self._reader.owned, worker_id)

    async def remove_worker(self, worker_id: str) -> None:
        await self._write(self._writer.remove_worker, worker_id)

    async def remove_ended_before(self, age_secs: float, limit: int) -> int:
        return await self._write(self._writer.remove_ended_before, age_secs, limit)

    async def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered:
        return await self._write(self._writer.register_workflow, definition, source, asked_by)

    async def add_audit_entry(self, entry: NewAuditEntry) -> None:
        await self._write(self._writer.add_audit_entry, entry)

    async def list_audit(
        self, where: AuditFilter, *, limit: int, after: tuple[datetime, int] | None = None
    ) -> AuditEntries:
        return await self._read(self._reader.list_audit, where, limit, after)

    async def remove_audit_before(self, age_secs: float, limit: int) -> int:
        return await self._write(self._writer.remove_audit_before, age_secs, limit)

    async def workflow(self, name: str, version: int | None = None) -> Workflow | None:
        return await self._read(self._reader.workflow, name, version)

    async def workflows(self) -> Sequence[Workflow]:
        return await self._read(self._reader.workflows)

    async def listen(self, tell: Callable[[Notice], None]) -> None:
        await trio.sleep_forever()

    async def ping(self) -> None:
        self._lane_health.check()
        self._write_health.check()
        await self._read(self._reader.ping)

    async def count_open(self) -> dict[SagaStatus, int]:
        return await self._read(self._reader.count_open)

    async def undo_debt(self) -> Sequence[UndoDebt]:
        return await self._read(self._reader.undo_debt)

    async def schema_state(self) -> SchemaState:
        return await self._read(self._reader.schema_state)


class SqliteOutbox:
    """Keeps `store.outbox.Outbox`: one process, one relay, all events."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.bell = Bell()

    async def take_share(self, relay_id: str, lease_secs: float) -> int:
        await trio.lowlevel.checkpoint()
        return 1

    async def keep(self, relay_id: str, lease_secs: float) -> None:
        await trio.lowlevel.checkpoint()

    async def pending(self, relay_id: str, *, limit: int, max_bytes: int) -> list[OutboxEvent]:
        return await self._store._read(self._store._reader.pending_events, relay_id, limit, max_bytes)

    async def settle(self, settled: Settled) -> None:
        await self._store._write(self._store._writer.settle_events, settled)

    async def backlog(self, relay_id: str) -> Backlog:
        return await self._store._read(self._store._reader.outbox_backlog, relay_id)

    async def leave(self, relay_id: str) -> None:
        await trio.lowlevel.checkpoint()


def _saga_id_of(row: _BATCH_ROW) -> str:
    return row.new.saga_id if isinstance(row, CreateRow) else row.record.before.saga_id


@asynccontextmanager
async def open_sqlite(
    path: str | Path, *, events: bool, clock: Clock | None = None, migrate: bool = True
) -> AsyncIterator[SqliteStore]:
    """The embedded store over a file (made, with its folder, if it is not there) or over `:memory:`.

    `events`: whether announcements are written to the outbox. `clock` gives every instant, by default this machine's;
    over a file it is asked in a worker thread. `migrate` False: the schema must be up to date already. Whoever was a
    worker before is one no longer; `release_expired_workers` then frees their sagas.
    `StoreInUse`: another process has the file. `MigrationError`: the schema does not fit.
    """
    instants = SystemClock() if clock is None else clock
    with ExitStack() as open_things:
        if str(path) == MEMORY:
            await trio.lowlevel.checkpoint()
            connection = open_things.enter_context(opened_connection(MEMORY))
            if migrate:
                sqlite_migrations.migrate_up(connection)
            yield SqliteStore(_Database(connection, instants, events), None)
            return

        def open_file() -> tuple[_Database, _Database]:
            with translated_sqlite():
                open_things.enter_context(locked(Path(path)))
                connection = open_things.enter_context(opened_connection(path))
                if migrate:
                    sqlite_migrations.migrate_up(connection)
                sqlite_migrations.require_current(connection)
                writer = _Database(connection, instants, events)
                writer.remove_all_workers()
                reader = _Database(open_things.enter_context(opened_connection(path)), instants, events)
                return writer, reader

        store = SqliteStore(*await trio.to_thread.run_sync(open_file))
        async with trio.open_nursery() as nursery:
            for lane in store.lanes:
                await nursery.start(lane.run)
            try:
                yield store
            finally:
                # The nursery then waits for what is still on its way to the disk.
                for lane in store.lanes:
                    lane.close()


@contextmanager
def opened_connection(path: str | Path) -> Iterator[sqlite3.Connection]:
    """A connection set up as this store needs it, closed at the end. `Unavailable`: SQLite is too old."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise Unavailable(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed")
    # Threads take turns (limiters in SqliteStore), so the driver's own check would only be in the way.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        connection.row_factory = sqlite3.Row
        connection.create_function("clock_timestamp", 0, lambda: to_text(SystemClock().now()))
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        yield connection
    finally:
        connection.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file beside the database that says it is in use; the system lets go of it however the process ends.

    `StoreInUse`: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(path.name + ".lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreInUse(f"{path} is in use by another process (it holds {lock_path})") from error
        yield
    finally:
        # The file stays: taking it away would let two processes hold locks on two files of one name.
        os.close(descriptor)
