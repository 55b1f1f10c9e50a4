"""The store on PostgreSQL, by asyncpg.

Every method is one crossing into asyncio: an exchange with the server, its commit and its clean-up run in one
coroutine, so that a Trio cancel never cuts a transaction in two. Writes run to their end, which `EXCHANGE_SECS` bounds,
whoever is cancelled meanwhile; only what keeps or ends a lease can be given up. Moves and creations gather in lanes
(`group_commit.py`), each with a connection of its own, and a batch is one statement, one round trip. Single writes
share one more connection, so that no crowd of readers can keep a lease from being renewed; reads use a small pool. One
connection listens for what other workers commit (`sql/postgres/008_notices.up.sql` says what they tell).

Instants are the database's. A clock may be given instead, for tests.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

import asyncpg
import msgspec
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
    NoticesMissed,
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
from store.postgres_errors import NothingSent, TryAgain, takes_no_writes, translated
from store.postgres_outbox import PostgresOutbox
from store.queries import Dialect, Query, load
from store.rows import CreateRow, MoveRow
from store.write_health import WriteHealth

T = TypeVar("T")

MOVE_LANES = 1
"""Lanes for moves, by the saga's id. Measured with two: no more moves a second from 100 callers, 1.4 times as many from
400, for half again the work of this process a move (43 us instead of 28) where batches get half as long. This process
is what runs out first, so one."""

EXCHANGE_SECS = 30.0
"""How long one exchange may take, the server's own work included, before it counts as lost. Far above any batch."""

IDLE_SECS = 5.0
"""How long the server waits for the next statement of a transaction. A process that stands still, or a machine that is
gone without a word, would keep what it has locked from all others for as long as its connection lasts: hours."""

LOCK_SECS = 2.0
"""How long a statement waits for a row that another transaction has changed and not committed. Ours need milliseconds;
a person's may stay open for hours, and others wait behind the statement, a lease among them. Above Postgres's
`deadlock_timeout`, so that of two transactions in a knot one gives way."""

CONNECT_SECS = 5.0
"""How long opening a connection may take. A database that needs longer is not one to wait for with sagas in hand."""

HEARTBEAT_SECS = 30.0
"""How often the listening connection is tried: one that broke without a word would be silent for ever. The poll behind
the notices is what is prompt, so this need not be."""

LISTEN_PAUSE_SECS = (0.1, 5.0)
"""First and longest pause before listening is tried again."""

GIVEN_WAY = 5
"""How often a transaction that had to give way to another is tried again. Rivals are few; a guess."""

NOTICES = "saga_notices"
"""The channel. The triggers of the migration name it too."""

log = logging.getLogger("saga.store")

_Q = load(Dialect.POSTGRES)

Connection = Any
"""asyncpg.Connection or a pool's proxy of it; the library has no types."""

_SESSION = {
    "application_name": "saga",
    "jit": "off",  # no statement here runs long enough to repay compiling it
    "statement_timeout": str(int(EXCHANGE_SECS * 1000)),  # the server gives up when we do
    "idle_in_transaction_session_timeout": str(int(IDLE_SECS * 1000)),
    "lock_timeout": str(int(LOCK_SECS * 1000)),
}
# Rewriting a table of millions takes its time, and what was cut off would be begun anew for ever. Another that migrates
# is waited for no longer than for any exchange, so that a server that waits says so and can be stopped.
MIGRATION_SESSION = {**_SESSION, "statement_timeout": "0", "lock_timeout": str(int(EXCHANGE_SECS * 1000))}
# A batch's statement is planned once a connection. Without seqscan because that plan must also suit a table that was
# empty when it was made and is not any more.
_WRITER_SESSION = {**_SESSION, "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off"}
# Optional filters and limits are only planned well with their values at hand.
_READER_SESSION = {**_SESSION, "plan_cache_mode": "force_custom_plan"}


async def _fetch(connection: Connection, query: Query, **parameters: object) -> list[Any]:
    """Runs a query with all its parameters, named. asyncpg prepares each text once a connection."""
    assert parameters.keys() == set(query.parameters), query.name  # every method has a case in tests/store
    rows_found: list[Any] = await connection.fetch(query.text, *(parameters[name] for name in query.parameters))
    return rows_found


class _Link:
    """One long-lived connection, opened when it is needed and opened anew after it was lost. Asyncio-flavoured, one
    exchange at a time."""

    def __init__(self, dsn: str, session: dict[str, str]) -> None:
        self._dsn = dsn
        self._session = session
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()
        self.health = WriteHealth(takes_no_writes)

    async def exchange(self, say: Callable[[Connection], Awaitable[T]]) -> T:
        """What `say` got from the server, in time. Errors come translated; after `Unavailable` the connection is given
        up, since nobody knows what state it is in. A transaction that had to give way is tried again."""
        with self.health.watched():
            return await self._exchange(say)

    async def _exchange(self, say: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._turn:
            for tried in range(GIVEN_WAY):
                try:
                    with translated():
                        connection = await self._opened()
                        async with asyncio.timeout(EXCHANGE_SECS):
                            return await say(connection)
                except TryAgain:
                    # Unequal pauses, or the two would meet again.
                    await asyncio.sleep(random.random() * 0.01 * 2**tried)
                except BaseException as error:
                    if not _leaves_connection_usable(error):
                        self.drop()
                    raise
            raise Unavailable("the database made the transaction give way again and again")

    async def _opened(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            try:
                with translated():
                    self._connection = await connect(self._dsn, self._session)
            except Unavailable as error:
                raise NothingSent(str(error)) from error
        return self._connection

    def drop(self) -> None:
        """Cuts the connection, if there is one, without a word to the server."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    @property
    def server_pid(self) -> int | None:
        """The server process at the other end, which signs the notices of what is written here."""
        return None if self._connection is None else self._connection.get_server_pid()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close(timeout=CONNECT_SECS)
            self._connection = None


def _leaves_connection_usable(error: BaseException) -> bool:
    """A refused statement does; a lost, late or cancelled one may still be running."""
    return isinstance(error, Exception) and not isinstance(error, Unavailable)


async def connect(dsn: str, session: dict[str, str] | None = None) -> Connection:
    """A connection set up as this store needs it. Asyncio-flavoured; errors are the driver's."""
    return await asyncpg.connect(
        dsn,
        timeout=CONNECT_SECS,
        server_settings=_SESSION if session is None else session,
        max_cached_statement_lifetime=0,  # the few statements there are stay prepared as long as the connection
    )


def _instant(instant: datetime | None) -> datetime | None:
    """asyncpg gives instants as such."""
    return instant


class PostgresStore:
    """Keeps `saga.ports.Store`. Made by `open_postgres`.

    `lanes`: the group commits, for their counters. `outbox`: the events it has written, for a relay.
    """

    def __init__(self, dsn: str, pool: Any, events: bool, clock: Clock | None) -> None:
        self._dsn = dsn
        self._pool = pool
        self._events = events
        self._clock = clock
        # Ids of claims and creations that may have made a worker owner although nobody was told. The next claim asks.
        self._lost_claim_ids: set[str] = set()
        self._single_writes = _Link(dsn, _READER_SESSION)
        self._creation_link = _Link(dsn, _WRITER_SESSION)
        self._relay_link = _Link(dsn, _WRITER_SESSION)
        self.outbox = PostgresOutbox(self._relay_link, self._now)
        self._move_links = [_Link(dsn, _WRITER_SESSION) for _ in range(MOVE_LANES)]
        self._creations: Lane[CreateRow, Created] = Lane(
            self._write_creations, key_of=lambda row: row.new.saga_id, name="creations"
        )
        self._moves: list[Lane[MoveRow, Recorded]] = [
            Lane(self._move_writer(link), key_of=lambda row: row.record.before.saga_id, name="moves")
            for link in self._move_links
        ]

    @property
    def _writing_links(self) -> tuple[_Link, ...]:
        return (self._single_writes, self._creation_link, *self._move_links)

    @property
    def lanes(self) -> tuple[Lane[Any, Any], ...]:
        return (self._creations, *self._moves)

    def _now(self) -> datetime | None:
        """The instant a query is to take for now; None: the database's."""
        return None if self._clock is None else self._clock.now()

    # --- crossings ----------------------------------------------------------------------------------------------------

    async def _read(self, say: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        async def body() -> T:
            async with asyncio.timeout(EXCHANGE_SECS):
                connection = await self._pool.acquire()
                try:
                    return await say(connection)
                except asyncio.CancelledError:
                    # Its release would first wait for the server to give the query up, and a server may hang.
                    connection.terminate()
                    raise
                finally:
                    await self._pool.release(connection)

        with translated():
            return await run_aio(body())

    async def _write(self, say: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Runs a single write to its end: a cancel comes before it or waits for its outcome, which is bounded in time.
        (A claim that was cut off would own sagas nobody knows of.)"""
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            answer = await run_aio(self._single_writes.exchange(say))
        return answer  # noqa: RET504  a scope may swallow, in mypy's eyes: a return inside it would not count

    async def _write_or_give_up(self, say: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Runs a single write that a cancel cuts off, with the connection if it was begun: whether it happened is then
        unknown. For writes whose caller has no time to wait for a database that hangs."""
        return await run_aio(self._single_writes.exchange(say))

    # --- the lanes' work ----------------------------------------------------------------------------------------------

    async def _write_creations(self, batch: Sequence[CreateRow]) -> Sequence[Created | Exception]:
        # One id a saga, unlike a claim's: a creation can be sent again and be answered by itself.
        claim_ids = {row.new.saga_id: str(uuid.uuid4()) for row in batch if row.new.owner is not None}
        try:
            results = await run_aio(
                self._creation_link.exchange(lambda connection: self._create_all(connection, batch, claim_ids))
            )
        except NothingSent:
            raise
        except Unavailable:
            self._lost_claim_ids.update(claim_ids.values())
            raise
        if self._events:
            self.outbox.bell.ring()
        return results

    def _move_writer(
        self, link: _Link
    ) -> Callable[[Sequence[MoveRow]], Coroutine[Any, Any, Sequence[Recorded | Exception]]]:
        async def write(batch: Sequence[MoveRow]) -> Sequence[Recorded | Exception]:
            results = await run_aio(link.exchange(lambda connection: self._record_all(connection, batch)))
            if self._events and any(row.record.events for row in batch):
                self.outbox.bell.ring()
            return results

        return write

    async def _create_all(
        self, connection: Connection, batch: Sequence[CreateRow], claim_ids: dict[str, str]
    ) -> list[Created | Exception]:
        made: dict[str, datetime] = {}
        results: dict[str, Created | Exception] = {}
        left = list(batch)
        # A row can be refused for one that is gone by the time we look (an operator deletes): then once more.
        while left:
            for row in await self._insert_sagas(connection, left, claim_ids):
                made[str(row["id"])] = row["created_at"]
            refused = [row for row in left if row.new.saga_id not in made]
            left = []
            if refused:
                earlier = await _fetch(
                    connection,
                    _Q["sagas_made_earlier"],
                    saga_ids=[row.new.saga_id for row in refused],
                    idempotency_keys=[
                        row.new.idempotency_key for row in refused if row.new.idempotency_key is not None
                    ],
                )
                found = {str(row["id"]): row for row in earlier}
                for row in refused:
                    if row.new.saga_id in found:  # sent before: now its caller is told, and no claim need be
                        self._lost_claim_ids.discard(str(found[row.new.saga_id]["claim_id"]))
                    judged = rows.judge_refused_create(row.new, earlier, _instant)
                    if judged is None:
                        left.append(row)
                    else:
                        results[row.new.saga_id] = judged
        for row in batch:
            created_at = made.get(row.new.saga_id)
            if created_at is not None:
                results[row.new.saga_id] = Created(saga=rows.new_saga_as_stored(row.new, created_at))
        return [results[row.new.saga_id] for row in batch]

    async def _insert_sagas(
        self, connection: Connection, batch: list[CreateRow], claim_ids: dict[str, str]
    ) -> list[Any]:
        news = [row.new for row in batch]
        return await _fetch(
            connection,
            _Q["create_sagas"],
            saga_ids=[new.saga_id for new in news],
            workflow_names=[new.workflow_name for new in news],
            workflow_versions=[new.workflow_version for new in news],
            payloads=[row.payload for row in batch],
            correlation_ids=[new.correlation_id for new in news],
            initiated_bys=[new.initiated_by for new in news],
            idempotency_keys=[new.idempotency_key for new in news],
            request_digests=[new.request_digest for new in news],
            traceparents=[new.traceparent for new in news],
            tracestates=[new.tracestate for new in news],
            owners=[new.owner for new in news],
            epochs=[rows.first_epoch(new) for new in news],
            claim_ids=[claim_ids.get(new.saga_id) for new in news],
            principals=[new.asked_by.principal for new in news],
            roles=[audit_rows.roles_text(new.asked_by) for new in news],
            addresses=[new.asked_by.address for new in news],
            request_ids=[new.asked_by.request_id for new in news],
            doors=[new.asked_by.door for new in news],
            events=self._events,
            now=self._now(),
        )

    async def _record_all(self, connection: Connection, batch: Sequence[MoveRow]) -> list[Recorded | Exception]:
        records = [row.record for row in batch]
        befores = [record.before for record in records]
        afters = [record.after for record in records]
        saga_ids = [before.saga_id for before in befores]
        logs = [
            (record.before.saga_id, entry, payloads)
            for row, record in zip(batch, records, strict=True)
            for entry, payloads in zip(record.logs, row.logs, strict=True)
        ]
        events = [(record.before.saga_id, event) for record in records for event in record.events if self._events]
        found = await _fetch(
            connection,
            _Q["record_moves"],
            saga_ids=saga_ids,
            owners_before=[before.owner for before in befores],
            epochs_before=[before.epoch for before in befores],
            revisions_before=[before.revision for before in befores],
            statuses=[after.status for after in afters],
            current_steps=[after.current_step for after in afters],
            error_messages=[after.error_message for after in afters],
            compensations_failed=[after.compensation_failed for after in afters],
            attempts=[after.attempt for after in afters],
            retries_in_secs=[record.retry_in_secs for record in records],
            deadlines_in_secs=[record.deadline_in_secs for record in records],
            outcomes_unknown=[after.outcome_unknown for after in afters],
            undo_plans=[row.undo_plan for row in batch],
            undos_failed=[row.undo_failed for row in batch],
            undos_corrections=[row.undo_corrections for row in batch],
            owners=[row.owner for row in batch],
            epochs=[after.epoch for after in afters],
            log_saga_ids=[saga_id for saga_id, _, _ in logs],
            log_step_indexes=[entry.step_index for _, entry, _ in logs],
            log_step_names=[entry.step_name for _, entry, _ in logs],
            log_actions=[entry.action for _, entry, _ in logs],
            log_statuses=[entry.status for _, entry, _ in logs],
            log_request_payloads=[payloads.request_payload for _, _, payloads in logs],
            log_response_payloads=[payloads.response_payload for _, _, payloads in logs],
            log_error_messages=[entry.error_message for _, entry, _ in logs],
            log_started_ats=[entry.started_at for _, entry, _ in logs],
            log_completed_ats=[entry.completed_at for _, entry, _ in logs],
            log_attempts=[entry.attempts for _, entry, _ in logs],
            event_saga_ids=[saga_id for saga_id, _ in events],
            event_types=[event.event_type for _, event in events],
            event_statuses=[event.status for _, event in events],
            event_current_steps=[event.current_step for _, event in events],
            event_error_messages=[event.error_message for _, event in events],
            now=self._now(),
        )
        landed = {str(row["id"]): row for row in found}
        refused = [saga_id for saga_id in saga_ids if saga_id not in landed]
        now = {}
        if refused:
            for row in await _fetch(connection, _Q["sagas_by_ids"], saga_ids=refused):
                now[str(row["id"])] = rows.saga_from_row(row, _instant)
        return [
            rows.moved_saga(row, landed[saga_id], _instant)
            if saga_id in landed
            else rows.judge_refused_move(row, now.get(saga_id))
            for saga_id, row in zip(saga_ids, batch, strict=True)
        ]

    # --- the port -----------------------------------------------------------------------------------------------------

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
                (result,) = await self._record_all(connection, [row])
                if isinstance(result, Recorded) and result.landed:
                    for entry in row.record.audit:
                        await self._enter(connection, entry)
                return result

        result = await self._write(say)
        if isinstance(result, Exception):
            raise result
        if self._events and row.record.events:
            self.outbox.bell.ring()
        return result

    async def _enter(self, connection: Connection, entry: NewAuditEntry) -> None:
        await _fetch(connection, _Q["add_audit_entry"], **audit_rows.entry_parameters(entry), now=self._now())

    async def get(self, saga_id: str) -> Saga | None:
        known = canonical_saga_id(saga_id)
        if known is None:
            return None

        async def say(connection: Connection) -> Saga | None:
            found = await _fetch(connection, _Q["sagas_by_ids"], saga_ids=[known])
            return rows.saga_from_row(found[0], _instant) if found else None

        return await self._read(say)

    async def step_logs(self, saga_id: str) -> list[StepLog]:
        known = canonical_saga_id(saga_id)
        if known is None:
            return []

        async def say(connection: Connection) -> list[StepLog]:
            found = await _fetch(connection, _Q["step_logs"], saga_id=known)
            return [rows.step_log_from_row(row, _instant) for row in found]

        return await self._read(say)

    async def list_sagas(
        self, where: SagaFilter, *, limit: int, offset: int = 0, after: tuple[datetime, str] | None = None
    ) -> Page:
        filters = rows.filter_parameters(where)

        async def say(connection: Connection) -> Page:
            total = (await _fetch(connection, _Q["count_sagas"], **filters))[0]["total"]
            found = await _fetch(
                connection,
                _Q["list_sagas"],
                **filters,
                after_created_at=None if after is None else after[0],
                after_id=None if after is None else after[1],
                limit=limit + 1,
                offset=0 if after is not None else offset,
            )
            return rows.page([rows.saga_from_row(row, _instant) for row in found], limit, total)

        return await self._read(say)

    async def request_cancel_unless_terminal(self, saga_id: str, asked_by: Requester = IN_PROCESS) -> Saga | None:
        known = canonical_saga_id(saga_id)
        if known is None:
            return None

        async def say(connection: Connection) -> Saga | None:
            async with connection.transaction():
                found = await _fetch(connection, _Q["request_cancel_unless_terminal"], saga_id=known)
                if found:
                    marked = rows.saga_from_row(found[0], _instant)
                    await self._enter(connection, audit_rows.cancel_entry(marked, asked_by))
                    return marked
            found = await _fetch(connection, _Q["sagas_by_ids"], saga_ids=[known])
            return rows.saga_from_row(found[0], _instant) if found else None

        return await self._write(say)

    async def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]:
        """As the port says; and what this worker was made owner of by an earlier call whose answer never came, be it
        beyond `limit`: nobody else would ever run it."""
        claim_id = str(uuid.uuid4())
        lost = set(self._lost_claim_ids)

        async def say(connection: Connection) -> list[Claimed]:
            found = await _fetch(
                connection,
                _Q["claim_due_sagas"],
                worker_id=worker_id,
                limit=limit,
                now=self._now(),
                claim_id=claim_id,
                lost_claim_ids=list(lost),
            )
            claimed = [rows.claimed_from_row(row, _instant) for row in found]
            return sorted(claimed, key=lambda one: (one.saga.created_at, one.saga.saga_id))

        try:
            claimed = await self._write(say)
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
                await _fetch(
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

        return await self._write(say)

    async def register_worker(self, worker_id: str, lease_secs: float) -> None:
        async def say(connection: Connection) -> None:
            await _fetch(connection, _Q["register_worker"], worker_id=worker_id, lease_secs=lease_secs, now=self._now())

        await self._write(say)

    async def renew_lease(self, worker_id: str, lease_secs: float) -> bool:
        async def say(connection: Connection) -> bool:
            return bool(
                await _fetch(
                    connection,
                    _Q["renew_lease_unless_ended"],
                    worker_id=worker_id,
                    lease_secs=lease_secs,
                    now=self._now(),
                )
            )

        return await self._write_or_give_up(say)

    async def release_expired_workers(self) -> int:
        async def say(connection: Connection) -> int:
            # Two statements, so that the second sees whom the first removed; a worker that renewed while the first
            # waited for its row was not removed and keeps its sagas. No transaction: who stood still amid it would keep
            # the others from sweeping, and their leases wait behind that. The second also frees what an earlier sweep
            # did not come to.
            await _fetch(connection, _Q["remove_expired_workers"], now=self._now())
            return len(await _fetch(connection, _Q["free_abandoned_sagas"]))

        return await self._write(say)

    async def cancel_requests(self, worker_id: str) -> Sequence[str]:
        async def say(connection: Connection) -> list[str]:
            found = await _fetch(connection, _Q["cancel_requests_of_worker"], worker_id=worker_id)
            return [str(row["id"]) for row in found]

        return await self._read(say)

    async def owned(self, worker_id: str) -> Sequence[Saga]:
        async def say(connection: Connection) -> list[Saga]:
            found = await _fetch(connection, _Q["open_sagas_of_worker"], worker_id=worker_id)
            return [rows.saga_from_row(row, _instant) for row in found]

        return await self._read(say)

    async def remove_worker(self, worker_id: str) -> None:
        async def say(connection: Connection) -> None:
            # No transaction: its ROLLBACK would wait for a database that hangs. Cut off between the two, the worker is
            # removed when its lease ends.
            await _fetch(connection, _Q["free_sagas_of_worker"], worker_id=worker_id)
            await _fetch(connection, _Q["remove_worker"], worker_id=worker_id)

        await self._write_or_give_up(say)

    async def remove_ended_before(self, age_secs: float, limit: int) -> int:
        async def say(connection: Connection) -> int:
            removed = await _fetch(
                connection, _Q["remove_ended_sagas"], age_secs=age_secs, limit=limit, now=self._now()
            )
            return len(removed)

        # Over a connection of the readers: on the one for single writes a lease would wait behind it. It is one
        # statement, so that a cancel, which cuts it off, leaves all of the batch or none.
        return await self._read(say)

    async def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered:
        name, text = definition.name, encode_definition(definition)

        async def say(connection: Connection) -> Registered:
            while True:
                async with connection.transaction():
                    added = await _fetch(
                        connection, _Q["register_workflow_if_changed"], name=name, definition=text, source=source
                    )
                    if added:
                        version: int = added[0]["version"]
                        await self._enter(connection, audit_rows.registration_entry(name, version, asked_by))
                        return Registered(version=version, changed=True)
                newest = await _fetch(connection, _Q["workflow"], name=name, version=None)
                # Not there, or not the same: another process was adding it just then. Ask again.
                if newest and rows.workflow_from_row(newest[0]).definition == definition:
                    return Registered(version=newest[0]["version"], changed=False)

        return await self._write(say)

    async def workflow(self, name: str, version: int | None = None) -> Workflow | None:
        async def say(connection: Connection) -> Workflow | None:
            found = await _fetch(connection, _Q["workflow"], name=name, version=version)
            return rows.workflow_from_row(found[0]) if found else None

        return await self._read(say)

    async def workflows(self) -> Sequence[Workflow]:
        async def say(connection: Connection) -> list[Workflow]:
            return [rows.workflow_from_row(row) for row in await _fetch(connection, _Q["workflows"])]

        return await self._read(say)

    async def add_audit_entry(self, entry: NewAuditEntry) -> None:
        await self._write(lambda connection: self._enter(connection, entry))

    async def list_audit(
        self, where: AuditFilter, *, limit: int, after: tuple[datetime, int] | None = None
    ) -> AuditEntries:
        query = _Q["list_audit"] if where.saga_id is None else _Q["list_audit_of_saga"]

        async def say(connection: Connection) -> AuditEntries:
            found = await _fetch(
                connection,
                query,
                **audit_rows.filter_parameters(where),
                after_created_at=None if after is None else after[0],
                after_id=None if after is None else after[1],
                limit=limit + 1,
            )
            return audit_rows.stretch([audit_rows.entry_from_row(row, _instant) for row in found], limit)

        return await self._read(say)

    async def remove_audit_before(self, age_secs: float, limit: int) -> int:
        async def say(connection: Connection) -> int:
            removed = await _fetch(
                connection, _Q["remove_audit_before"], age_secs=age_secs, limit=limit, now=self._now()
            )
            return len(removed)

        return await self._read(say)  # for the reasons of remove_ended_before

    async def listen(self, tell: Callable[[Notice], None]) -> None:
        first, longest = LISTEN_PAUSE_SECS
        pause_secs = first
        listening = True  # that it never came to it is told as well

        def told(notice: Notice) -> None:
            nonlocal listening
            if isinstance(notice, NoticesMissed):
                listening = True
            tell(notice)

        while True:
            began = trio.current_time()
            try:
                await run_aio(self._listen_until_lost(told))
            except Unavailable as error:
                # Nothing depends on notices: the poll behind them finds the same, up to a second later.
                level, listening = (logging.INFO if listening else logging.DEBUG), False
                log.log(level, "notices_lost error=%s", error)
            if trio.current_time() - began > longest:
                pause_secs = first
            await trio.sleep(pause_secs)
            pause_secs = min(pause_secs * 2, longest)

    async def _listen_until_lost(self, tell: Callable[[Notice], None]) -> None:
        """Listens on a connection of its own; `Unavailable`: it was lost. Asyncio-flavoured."""
        lost = asyncio.Event()

        def on_notice(_connection: Connection, sender: int, _channel: str, payload: str) -> None:
            # What this process commits it knows; its own notices would make it look for what it has just taken.
            if any(link.server_pid == sender for link in self._writing_links):
                return
            try:
                notice = msgspec.json.decode(payload, type=Notice)
            except msgspec.DecodeError:
                log.warning("notice_unknown payload=%.200r", payload)  # a newer release beside us, or a stranger
            else:
                tell(notice)

        with translated():
            connection = await connect(self._dsn)
            try:
                connection.add_termination_listener(lambda _connection: lost.set())
                async with asyncio.timeout(CONNECT_SECS):
                    await connection.add_listener(NOTICES, on_notice)
                tell(NoticesMissed())
                while not lost.is_set():
                    try:
                        async with asyncio.timeout(HEARTBEAT_SECS):
                            await lost.wait()
                    except TimeoutError:
                        async with asyncio.timeout(CONNECT_SECS):
                            await _fetch(connection, _Q["ping"])
            finally:
                connection.terminate()
        raise Unavailable("the listening connection was lost")

    async def ping(self) -> None:
        for link in self._writing_links:
            link.health.check()

        async def say(connection: Connection) -> None:
            await _fetch(connection, _Q["ping"])

        await self._read(say)

    async def count_open(self) -> dict[SagaStatus, int]:
        async def say(connection: Connection) -> dict[SagaStatus, int]:
            found = await _fetch(connection, _Q["count_open_sagas"])
            return {SagaStatus(row["status"]): row["total"] for row in found}

        return await self._read(say)

    async def undo_debt(self) -> Sequence[UndoDebt]:
        async def say(connection: Connection) -> list[UndoDebt]:
            found = await _fetch(connection, _Q["undo_debt"], now=self._now())
            return [rows.undo_debt_from_row(row) for row in found]

        return await self._read(say)

    async def schema_state(self) -> SchemaState:
        return await self._read(postgres_migrations.schema_state)

    async def close_connections(self) -> None:
        """Says good-bye to the server where it listens; what does not answer in time is cut. Asyncio-flavoured."""
        links = (*self._writing_links, self._relay_link)
        try:
            async with asyncio.timeout(CONNECT_SECS):
                for link in links:
                    await link.close()
                await self._pool.close()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            pass  # nothing is lost by it: everything durable is durable, and the server notices
        finally:
            for link in links:
                link.drop()
            self._pool.terminate()


async def _keep_session(_connection: Connection) -> None:
    """In place of asyncpg's reset after each use, a round trip of its own: reads leave nothing behind to reset."""


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

    async def prepare() -> Any:
        with translated():
            connection = await connect(dsn, MIGRATION_SESSION)
            try:
                if migrate:
                    await postgres_migrations.migrate_up(connection)
                else:
                    await postgres_migrations.require_current(connection)
            finally:
                await connection.close()
            return await asyncpg.create_pool(
                dsn,
                min_size=min(ready_connections, readers),
                max_size=readers,
                max_inactive_connection_lifetime=idle_secs,
                timeout=CONNECT_SECS,
                server_settings=_READER_SESSION,
                max_cached_statement_lifetime=0,
                reset=_keep_session,
            )

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
