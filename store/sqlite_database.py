"""Everything that is said to SQLite, blocking, on one connection: batches, reads and single writes."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, cast

import msgspec

from saga.audit import IN_PROCESS, AuditEntries, AuditFilter, NewAuditEntry, Requester
from saga.errors import Conflict, RowRejected
from saga.model import EventType, LogEntry, Saga, SagaEvent, SagaStatus, StepLog
from saga.ports import Claimed, Clock, Created, Page, Recorded, Registered, SagaFilter, SchemaState, UndoDebt
from saga.workflow import Workflow, WorkflowDefinition, encode_definition
from store import audit_rows, rows, sqlite_migrations
from store.cloudevents import OutboxEvent
from store.instants import after_secs, from_text, seconds_between, to_text
from store.outbox import Backlog, Settled
from store.queries import Dialect, Query, load
from store.rows import CreateRow, LogRow, MoveRow
from store.sqlite_connections import translated_sqlite

COUNTED = 100_000
"""Pending events counted at most: the count is for people and is taken every few seconds."""

_Q = load(Dialect.SQLITE)
BatchRow = CreateRow | MoveRow
BatchResult = Created | Recorded

# What SQLite, or the driver on the way to it, says of content; everything else it says is about the database.
_CONTENT_ERRORS = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError)


class SqliteDatabase:
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

    def write_batch(self, batch: Sequence[BatchRow]) -> list[BatchResult | Exception]:
        """Writes the rows in one transaction. A row that is refused for its content makes it start over with a
        savepoint for each, which costs too much for every day."""
        with translated_sqlite():
            try:
                with self._transaction():
                    return [self._write_row(row) for row in batch]
            except _CONTENT_ERRORS:
                with self._transaction():
                    return [self._write_row_or_rejection(row) for row in batch]

    def _write_row_or_rejection(self, row: BatchRow) -> BatchResult | Exception:
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

    def _write_row(self, row: BatchRow) -> BatchResult | Exception:
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
        record, now = row.record, self._clock.now()
        saga_id = record.before.saga_id
        landed = self._write_move(row, now)
        if not landed:
            return rows.judge_refused_move(row, self.get(saga_id))
        for entry, payloads in zip(record.logs, row.logs, strict=True):
            self._add_step_log(saga_id, entry, payloads)
        if self._events:
            for event in record.events:
                self._announce(saga_id, event)
        for asked in record.audit:
            self._enter(asked, now)
        return rows.moved_saga(row, landed[0], _instant)

    def _write_move(self, row: MoveRow, now: datetime) -> list[Any]:
        """The saga's row as it is now; none: the move was refused."""
        record = row.record
        before, after = record.before, record.after
        # fetchone on a RETURNING statement leaves it open; fetchall ends it, as a COMMIT needs.
        return self._connection.execute(
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

    def _add_step_log(self, saga_id: str, entry: LogEntry, payloads: LogRow) -> None:
        self._connection.execute(
            _Q["add_step_log"].text,
            {
                "id": str(uuid.uuid4()),
                "saga_id": saga_id,
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
                events.append(rows.event_from_row(_row(row), _instant))
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

    def request_cancel_unless_terminal(
        self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None
    ) -> Saga | None:
        with _content_rejected(f"saga {saga_id}: the database refuses the audit entry"), self._transaction():
            found = self._run(_Q["request_cancel_unless_terminal"], saga_id=saga_id)
            if not found:
                return self.get(saga_id)
            marked = rows.saga_from_row(_row(found[0]), _instant)
            self._enter(audit_rows.cancel_entry(marked, asked_by, reason))
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
        with _content_rejected(f"workflow {definition.name}: the database refuses the definition"), self._transaction():
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

    def add_audit_entry(self, entry: NewAuditEntry) -> None:
        with _content_rejected("the database refuses the audit entry"), self._transaction():
            self._enter(entry)

    def remove_audit_before(self, age_secs: float, limit: int) -> int:
        with self._transaction():
            self._run(_Q["set_audit_removal"], age_secs=age_secs, now=None)
            removed = self._run(_Q["remove_audit_before"], age_secs=age_secs, limit=limit, now=None)
            self._run(_Q["set_audit_removal"], age_secs=None, now=None)
        return len(removed)


@contextmanager
def _content_rejected(refusal: str) -> Iterator[None]:
    """What the database says of the content of a row becomes `RowRejected`: `refusal`, and why."""
    try:
        yield
    except _CONTENT_ERRORS as error:
        raise RowRejected(f"{refusal}: {error}") from error


def _instant(text: str | None) -> datetime | None:
    return None if text is None else from_text(text)


def _text(instant: datetime | None) -> str | None:
    return None if instant is None else to_text(instant)


def _array(values: Sequence[str | None]) -> str:
    """What json_each() reads as a list."""
    return msgspec.json.encode(values).decode()


def _row(row: sqlite3.Row) -> rows.Row:
    """sqlite3.Row is a mapping by column name in all but type."""
    return cast(rows.Row, row)


def _later(now: datetime, secs: float | None) -> str | None:
    return None if secs is None else to_text(now + timedelta(seconds=secs))
