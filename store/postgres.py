"""The store on PostgreSQL, by asyncpg.

Every method is one crossing into asyncio: an exchange with the server, its commit and its clean-up run in one
coroutine, so that a Trio cancel never cuts a transaction in two. Writes run to their end, which `EXCHANGE_SECS` bounds,
whoever is cancelled meanwhile; only what keeps or ends a lease can be given up. Moves and creations gather in lanes
(`postgres_lanes.py`). Single writes share one more connection, so that no crowd of readers can keep a lease from being
renewed; reads use a small pool. One connection listens (`postgres_notices.py`).

Instants are the database's. A clock may be given instead, for tests.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import asyncpg
import trio

from bridge import run_aio
from saga.audit import IN_PROCESS, AuditEntries, AuditFilter, NewAuditEntry, Requester
from saga.errors import Unavailable
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
from saga.workflow import Workflow, WorkflowDefinition, encode_definition
from store import audit_rows, postgres_migrations, rows
from store.group_commit import Lane
from store.postgres_connections import (
    CONNECT_SECS,
    MIGRATION_SESSION,
    READER_SESSION,
    WRITER_SESSION,
    Connection,
    Link,
    Readers,
    connect,
    fetch,
    instant,
    open_readers,
)
from store.postgres_errors import NothingSent, translated
from store.postgres_lanes import MOVE_LANES, PostgresLanes
from store.postgres_notices import PostgresNotices
from store.postgres_outbox import PostgresOutbox
from store.queries import Dialect, load
from store.rows import MoveRow

_Q = load(Dialect.POSTGRES)


class PostgresStore:
    """Keeps `saga.ports.Store`. Made by `open_postgres`.

    `lanes`: the group commits, for their counters. `outbox`: the events it has written, for a relay.
    """

    def __init__(self, dsn: str, readers: Readers, events: bool, clock: Clock | None) -> None:
        self._readers = readers
        self._events = events
        self._clock = clock
        # Ids of claims and creations that may have made a worker owner although nobody was told. The next claim asks.
        self._lost_claim_ids: set[str] = set()
        self._single_writes = Link(dsn, READER_SESSION)
        self._relay_link = Link(dsn, WRITER_SESSION)
        self.outbox = PostgresOutbox(self._relay_link, self._now)
        self._lanes = PostgresLanes(
            dsn, events=events, now=self._now, bell=self.outbox.bell, lost_claim_ids=self._lost_claim_ids
        )
        self._creations, self._moves = self._lanes.creations, self._lanes.moves
        self._writing_links = (self._single_writes, *self._lanes.links)
        self._notices = PostgresNotices(dsn, self._writing_links)

    @property
    def lanes(self) -> tuple[Lane[Any, Any], ...]:
        return (self._creations, *self._moves)

    def _now(self) -> datetime | None:
        """The instant a query is to take for now; None: the database's."""
        return None if self._clock is None else self._clock.now()

    async def create(self, new: NewSaga) -> Created:
        return await self._creations.write(rows.prepare_create(new))

    async def record(self, record: Record) -> Recorded:
        row = rows.prepare_move(record)
        if record.audit:
            return await self._record_asked(row)
        # Not hash(): a saga's lane is its own also in the next process, which helps whoever reads a trace.
        lane = self._moves[int(record.before.saga_id[-4:], 16) % len(self._moves)]
        return await lane.write(row)

    async def _record_asked(self, row: MoveRow) -> Recorded:
        """A move that somebody asked for, with who that was. Few are, so that the lane's statement, which all others
        pay for, says nothing of it; the fence holds between the two as it does between two workers."""

        async def say(connection: Connection) -> Recorded | Exception:
            async with connection.transaction():
                (result,) = await self._lanes.record_all(connection, [row])
                if isinstance(result, Recorded) and result.landed:
                    for entry in row.record.audit:
                        await self._enter(connection, entry)
                return result

        result = await self._single_writes.write(say)
        if isinstance(result, Exception):
            raise result
        if self._events and row.record.events:
            self.outbox.bell.ring()
        return result

    async def _enter(self, connection: Connection, entry: NewAuditEntry) -> None:
        await fetch(connection, _Q["add_audit_entry"], **audit_rows.entry_parameters(entry), now=self._now())

    async def get(self, saga_id: str) -> Saga | None:
        known = canonical_saga_id(saga_id)
        if known is None:
            return None

        async def say(connection: Connection) -> Saga | None:
            found = await fetch(connection, _Q["sagas_by_ids"], saga_ids=[known])
            return rows.saga_from_row(found[0], instant) if found else None

        return await self._readers.read(say)

    async def step_logs(self, saga_id: str) -> list[StepLog]:
        known = canonical_saga_id(saga_id)
        if known is None:
            return []

        async def say(connection: Connection) -> list[StepLog]:
            found = await fetch(connection, _Q["step_logs"], saga_id=known)
            return [rows.step_log_from_row(row, instant) for row in found]

        return await self._readers.read(say)

    async def list_sagas(
        self, where: SagaFilter, *, limit: int, offset: int = 0, after: tuple[datetime, str] | None = None
    ) -> Page:
        filters = rows.filter_parameters(where)

        async def say(connection: Connection) -> Page:
            total = (await fetch(connection, _Q["count_sagas"], **filters))[0]["total"]
            found = await fetch(
                connection,
                _Q["list_sagas"],
                **filters,
                after_created_at=None if after is None else after[0],
                after_id=None if after is None else after[1],
                limit=limit + 1,
                offset=0 if after is not None else offset,
            )
            return rows.page([rows.saga_from_row(row, instant) for row in found], limit, total)

        return await self._readers.read(say)

    async def request_cancel_unless_terminal(
        self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None
    ) -> Saga | None:
        known = canonical_saga_id(saga_id)
        if known is None:
            return None

        async def say(connection: Connection) -> Saga | None:
            async with connection.transaction():
                found = await fetch(connection, _Q["request_cancel_unless_terminal"], saga_id=known)
                if found:
                    marked = rows.saga_from_row(found[0], instant)
                    await self._enter(connection, audit_rows.cancel_entry(marked, asked_by, reason))
                    return marked
            found = await fetch(connection, _Q["sagas_by_ids"], saga_ids=[known])
            return rows.saga_from_row(found[0], instant) if found else None

        return await self._single_writes.write(say)

    async def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]:
        """As the port says; and what this worker was made owner of by an earlier call whose answer never came, be it
        beyond `limit`: nobody else would ever run it."""
        claim_id = str(uuid.uuid4())
        lost = set(self._lost_claim_ids)

        async def say(connection: Connection) -> list[Claimed]:
            found = await fetch(
                connection,
                _Q["claim_due_sagas"],
                worker_id=worker_id,
                limit=limit,
                now=self._now(),
                claim_id=claim_id,
                lost_claim_ids=list(lost),
            )
            claimed = [rows.claimed_from_row(row, instant) for row in found]
            return sorted(claimed, key=lambda one: (one.saga.created_at, one.saga.saga_id))

        try:
            claimed = await self._single_writes.write(say)
        except NothingSent:
            raise
        except Unavailable:
            self._lost_claim_ids.add(claim_id)
            raise
        self._lost_claim_ids -= lost
        return claimed

    async def release(self, saga: Saga, *, interrupted: bool, retry_in_secs: float | None = None) -> bool:
        async def say(connection: Connection) -> bool:
            return bool(
                await fetch(
                    connection,
                    _Q["release_if_owned"],
                    saga_id=saga.saga_id,
                    owner=saga.owner,
                    epoch=saga.epoch,
                    interrupted=interrupted,
                    retry_in_secs=retry_in_secs,
                    now=self._now(),
                )
            )

        return await self._single_writes.write(say)

    async def register_worker(self, worker_id: str, lease_secs: float) -> None:
        async def say(connection: Connection) -> None:
            await fetch(connection, _Q["register_worker"], worker_id=worker_id, lease_secs=lease_secs, now=self._now())

        await self._single_writes.write(say)

    async def renew_lease(self, worker_id: str, lease_secs: float) -> bool:
        async def say(connection: Connection) -> bool:
            return bool(
                await fetch(
                    connection,
                    _Q["renew_lease_unless_ended"],
                    worker_id=worker_id,
                    lease_secs=lease_secs,
                    now=self._now(),
                )
            )

        return await self._single_writes.write_or_give_up(say)

    async def release_expired_workers(self) -> int:
        async def say(connection: Connection) -> int:
            # Two statements, so that the second sees whom the first removed; a worker that renewed while the first
            # waited for its row was not removed and keeps its sagas. No transaction: who stood still amid it would keep
            # the others from sweeping, and their leases wait behind that. The second also frees what an earlier sweep
            # did not come to.
            await fetch(connection, _Q["remove_expired_workers"], now=self._now())
            return len(await fetch(connection, _Q["free_abandoned_sagas"]))

        return await self._single_writes.write(say)

    async def cancel_requests(self, worker_id: str) -> Sequence[str]:
        async def say(connection: Connection) -> list[str]:
            found = await fetch(connection, _Q["cancel_requests_of_worker"], worker_id=worker_id)
            return [str(row["id"]) for row in found]

        return await self._readers.read(say)

    async def owned(self, worker_id: str) -> Sequence[Saga]:
        async def say(connection: Connection) -> list[Saga]:
            found = await fetch(connection, _Q["open_sagas_of_worker"], worker_id=worker_id)
            return [rows.saga_from_row(row, instant) for row in found]

        return await self._readers.read(say)

    async def remove_worker(self, worker_id: str) -> None:
        async def say(connection: Connection) -> None:
            # No transaction: its ROLLBACK would wait for a database that hangs. Cut off between the two, the worker is
            # removed when its lease ends.
            await fetch(connection, _Q["free_sagas_of_worker"], worker_id=worker_id)
            await fetch(connection, _Q["remove_worker"], worker_id=worker_id)

        await self._single_writes.write_or_give_up(say)

    async def remove_ended_before(self, age_secs: float, limit: int) -> int:
        async def say(connection: Connection) -> int:
            removed = await fetch(connection, _Q["remove_ended_sagas"], age_secs=age_secs, limit=limit, now=self._now())
            return len(removed)

        # Over a connection of the readers: on the one for single writes a lease would wait behind it. It is one
        # statement, so that a cancel, which cuts it off, leaves all of the batch or none.
        return await self._readers.read(say)

    async def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered:
        name, text = definition.name, encode_definition(definition)

        async def say(connection: Connection) -> Registered:
            while True:
                async with connection.transaction():
                    added = await fetch(
                        connection, _Q["register_workflow_if_changed"], name=name, definition=text, source=source
                    )
                    if added:
                        version: int = added[0]["version"]
                        await self._enter(connection, audit_rows.registration_entry(name, version, asked_by))
                        return Registered(version=version, changed=True)
                newest = await fetch(connection, _Q["workflow"], name=name, version=None)
                # Not there, or not the same: another process was adding it just then. Ask again.
                if newest and rows.workflow_from_row(newest[0]).definition == definition:
                    return Registered(version=newest[0]["version"], changed=False)

        return await self._single_writes.write(say)

    async def workflow(self, name: str, version: int | None = None) -> Workflow | None:
        async def say(connection: Connection) -> Workflow | None:
            found = await fetch(connection, _Q["workflow"], name=name, version=version)
            return rows.workflow_from_row(found[0]) if found else None

        return await self._readers.read(say)

    async def workflows(self) -> Sequence[Workflow]:
        async def say(connection: Connection) -> list[Workflow]:
            return [rows.workflow_from_row(row) for row in await fetch(connection, _Q["workflows"])]

        return await self._readers.read(say)

    async def add_audit_entry(self, entry: NewAuditEntry) -> None:
        await self._single_writes.write(lambda connection: self._enter(connection, entry))

    async def list_audit(
        self, where: AuditFilter, *, limit: int, after: tuple[datetime, int] | None = None
    ) -> AuditEntries:
        query = _Q["list_audit"] if where.saga_id is None else _Q["list_audit_of_saga"]

        async def say(connection: Connection) -> AuditEntries:
            found = await fetch(
                connection,
                query,
                **audit_rows.filter_parameters(where),
                after_created_at=None if after is None else after[0],
                after_id=None if after is None else after[1],
                limit=limit + 1,
            )
            return audit_rows.stretch([audit_rows.entry_from_row(row, instant) for row in found], limit)

        return await self._readers.read(say)

    async def remove_audit_before(self, age_secs: float, limit: int) -> int:
        async def say(connection: Connection) -> int:
            removed = await fetch(
                connection, _Q["remove_audit_before"], age_secs=age_secs, limit=limit, now=self._now()
            )
            return len(removed)

        return await self._readers.read(say)  # for the reasons of remove_ended_before

    async def listen(self, tell: Callable[[Notice], None]) -> None:
        await self._notices.listen(tell)

    async def ping(self) -> None:
        for link in self._writing_links:
            link.health.check()

        async def say(connection: Connection) -> None:
            await fetch(connection, _Q["ping"])

        await self._readers.read(say)

    async def count_open(self) -> dict[SagaStatus, int]:
        async def say(connection: Connection) -> dict[SagaStatus, int]:
            found = await fetch(connection, _Q["count_open_sagas"])
            return {SagaStatus(row["status"]): row["total"] for row in found}

        return await self._readers.read(say)

    async def undo_debt(self) -> Sequence[UndoDebt]:
        async def say(connection: Connection) -> list[UndoDebt]:
            found = await fetch(connection, _Q["undo_debt"], now=self._now())
            return [rows.undo_debt_from_row(row) for row in found]

        return await self._readers.read(say)

    async def schema_state(self) -> SchemaState:
        return await self._readers.read(postgres_migrations.schema_state)

    async def close_connections(self) -> None:
        """Says good-bye to the server where it listens; what does not answer in time is cut. Asyncio-flavoured."""
        links = (*self._writing_links, self._relay_link)
        try:
            async with asyncio.timeout(CONNECT_SECS):
                for link in links:
                    await link.close()
                await self._readers.close()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pass  # nothing is lost by it: everything durable is durable, and the server notices
        finally:
            for link in links:
                link.drop()
            self._readers.drop()


@asynccontextmanager
async def open_postgres(
    dsn: str,
    *,
    events: bool,
    max_connections: int = 10,
    ready_connections: int = 1,
    idle_secs: float = 300.0,
    migrate: bool = True,
    clock: Clock | None = None,
) -> AsyncIterator[PostgresStore]:
    """The store on a database. To be entered inside `bridge.open_loop()`.

    `dsn`: `postgresql://user:password@host:port/database?sslmode=…`. `events`: whether announcements are written to the
    outbox. `max_connections`: three of them write, one listens, the others, at least one, read; `ready_connections` of
    the readers are opened now, and a reader that was idle for `idle_secs` (0: for ever) is closed. `migrate` False: the
    schema must be up to date already. `clock`: instants from it instead of from the database; for tests.
    `Unavailable`: the database cannot be reached. `MigrationError`: the schema does not fit.
    """

    readers = max(1, max_connections - WRITE_CONNECTIONS - 1 - (1 if events else 0))

    async def prepare() -> Readers:
        with translated():
            connection = await connect(dsn, MIGRATION_SESSION)
            try:
                if migrate:
                    await postgres_migrations.migrate_up(connection)
                else:
                    await postgres_migrations.require_current(connection)
            finally:
                await connection.close()
            return await open_readers(dsn, most=readers, ready=min(ready_connections, readers), idle_secs=idle_secs)

    store = PostgresStore(dsn, await run_aio(prepare()), events, clock)
    try:
        async with trio.open_nursery() as nursery:
            for lane in store.lanes:
                await nursery.start(lane.run)
            try:
                yield store
            finally:
                # The nursery then waits for what is still on its way to the server.
                for lane in store.lanes:
                    lane.close()
    finally:
        with trio.CancelScope(shield=True):
            await run_aio(store.close_connections())


WRITE_CONNECTIONS = MOVE_LANES + 2
"""One a lane of moves, one for creations, one for single writes."""
