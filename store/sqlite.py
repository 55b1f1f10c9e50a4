"""The embedded store: one process, one SQLite file (or none: `:memory:`), the standard library's driver.

`SqliteStore` keeps the port over what `sqlite_database.py` says to SQLite, in one of two ways. A file: writes share
transactions in a lane and run, one at a time, in a worker thread; reads have a connection of their own. Memory:
everything runs at once in the calling task, without a thread, so that the engine can be tested under Trio's virtual
clock. The durability of the file is SQLite's: WAL with synchronous=FULL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, cast

import trio

from saga.audit import IN_PROCESS, AuditEntries, AuditFilter, NewAuditEntry, Requester
from saga.model import Saga, SagaStatus, StepLog
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
from saga.workflow import Workflow, WorkflowDefinition
from store import rows, sqlite_migrations
from store.cloudevents import OutboxEvent
from store.group_commit import Lane
from store.instants import SystemClock
from store.outbox import Backlog, Bell, Settled
from store.rows import CreateRow
from store.sqlite_connections import MEMORY, locked, opened_connection, translated_sqlite
from store.sqlite_database import BatchResult, BatchRow, SqliteDatabase
from store.write_health import WriteHealth

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SqliteStore:
    """Keeps `saga.ports.Store`. Made by `open_sqlite`.

    `lanes`: the group commits, for their counters; none in memory, where every write is a transaction of its own.
    `outbox`: the events it has written, for a relay.
    """

    def __init__(self, writer: SqliteDatabase, reader: SqliteDatabase | None) -> None:
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
        self._lane: Lane[BatchRow, BatchResult] | None = None
        if not self._inline:
            self._lane = Lane(self._write_batch, key_of=_saga_id_of)

    @property
    def lanes(self) -> tuple[Lane[Any, Any], ...]:
        return () if self._lane is None else (self._lane,)

    async def _write_batch(self, batch: Sequence[BatchRow]) -> Sequence[BatchResult | Exception]:
        with self._lane_health.watched():
            results = await trio.to_thread.run_sync(self._writer.write_batch, batch, limiter=self._writing)
        self._ring_for(batch)
        return results

    async def _in_lane(self, row: BatchRow) -> BatchResult:
        if self._lane is not None:
            return await self._lane.write(row)
        (result,) = await self._write(self._writer.write_batch, [row])
        self._ring_for([row])
        if isinstance(result, Exception):
            raise result
        return result

    def _ring_for(self, batch: Sequence[BatchRow]) -> None:
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

    async def request_cancel_unless_terminal(
        self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None
    ) -> Saga | None:
        known = canonical_saga_id(saga_id)
        if known is None:
            return None
        return await self._write(self._writer.request_cancel_unless_terminal, known, asked_by, reason)

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


def _saga_id_of(row: BatchRow) -> str:
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
            yield SqliteStore(SqliteDatabase(connection, instants, events), None)
            return

        def open_file() -> tuple[SqliteDatabase, SqliteDatabase]:
            with translated_sqlite():
                open_things.enter_context(locked(Path(path)))
                connection = open_things.enter_context(opened_connection(path))
                if migrate:
                    sqlite_migrations.migrate_up(connection)
                sqlite_migrations.require_current(connection)
                writer = SqliteDatabase(connection, instants, events)
                writer.remove_all_workers()
                reader = SqliteDatabase(open_things.enter_context(opened_connection(path)), instants, events)
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
