"""What only the Postgres store promises: the catalogue of the design, lost connections, batches of one round trip."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import asyncpg
import pytest
import trio
import trio.testing

from bridge import open_loop, run_aio
from saga.errors import RowRejected, Unavailable
from saga.model import Saga
from saga.ports import Recorded
from store.errors import StoreRefuses
from store.postgres import PostgresStore, open_postgres
from store.postgres_connections import READER_SESSION, SESSION, WRITER_SESSION, Link, fetch
from store.postgres_errors import NothingSent, TryAgain, translation_of
from store.queries import Dialect, Query, load
from tests.store.samples import WORKER, created, log_entry, move, new_saga, running
from tests.support.postgres import PostgresServer, in_plain_loop


def ask(dsn: str, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
    async def body() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(dsn)
        try:
            return [tuple(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            await connection.close()

    return in_plain_loop(body)


# --- the catalogue against the tables of the design -------------------------------------------------------------------

# Column, type, NOT NULL, default: as the design's table has them. Columns beyond it are ours.
DESIGN = {
    "saga_states": [
        ("id", "uuid", True, "gen_random_uuid()"),
        ("workflow_name", "character varying(255)", True, None),
        ("current_step", "integer", True, "0"),
        ("status", "character varying(50)", True, "'STARTED'::character varying"),
        ("payload", "jsonb", False, None),
        ("correlation_id", "character varying(255)", False, None),
        ("initiated_by", "character varying(255)", False, None),
        ("error_message", "text", False, None),
        ("created_at", "timestamp with time zone", True, "now()"),
        ("updated_at", "timestamp with time zone", True, "now()"),
    ],
    "saga_step_logs": [
        ("id", "uuid", True, "gen_random_uuid()"),
        ("saga_id", "uuid", True, None),
        ("step_index", "integer", True, None),
        ("step_name", "character varying(255)", True, None),
        ("action", "character varying(50)", True, None),
        ("status", "character varying(50)", True, None),
        ("request_payload", "jsonb", False, None),
        ("response_payload", "jsonb", False, None),
        ("error_message", "text", False, None),
        ("started_at", "timestamp with time zone", True, "now()"),
        ("completed_at", "timestamp with time zone", False, None),
    ],
}

DESIGN_INDEXES = {
    "idx_saga_states_workflow_name": "saga.saga_states USING btree (workflow_name)",
    "idx_saga_states_status": "saga.saga_states USING btree (status)",
    "idx_saga_states_correlation_id": (
        "saga.saga_states USING btree (correlation_id) WHERE (correlation_id IS NOT NULL)"
    ),
    "idx_saga_states_created_at": "saga.saga_states USING btree (created_at)",
    "idx_saga_step_logs_saga_id_step_index": "saga.saga_step_logs USING btree (saga_id, step_index)",
}


@pytest.mark.parametrize("table", DESIGN)
def test_the_columns_of_the_design_are_there_to_the_letter_and_first(postgres_dsn: str, table: str) -> None:
    columns = ask(
        postgres_dsn,
        """
        SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = ('saga.' || $1)::regclass AND a.attnum > 0
        ORDER BY a.attnum
        """,
        table,
    )
    assert columns[: len(DESIGN[table])] == DESIGN[table]


def test_the_indexes_of_the_design_are_there_by_name(postgres_dsn: str) -> None:
    found = dict(ask(postgres_dsn, "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'saga'"))
    for name, definition in DESIGN_INDEXES.items():
        assert found[name] == f"CREATE INDEX {name} ON {definition}"


def test_the_keys_and_checks_of_the_design_are_there(postgres_dsn: str) -> None:
    found = {
        definition
        for (definition,) in ask(
            postgres_dsn,
            "SELECT conrelid::regclass || ': ' || pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'saga'::regnamespace",
        )
    }
    assert "saga.saga_states: PRIMARY KEY (id)" in found
    assert "saga.saga_step_logs: PRIMARY KEY (id)" in found
    assert "saga.saga_step_logs: FOREIGN KEY (saga_id) REFERENCES saga.saga_states(id) ON DELETE CASCADE" in found


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, status) VALUES ('a', 1, 'PAUSED')",
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, idempotency_key) VALUES ('a', 1, 'k')",
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, current_step) VALUES ('a', 1, -1)",
    ],
)
def test_the_tables_refuse_what_the_model_does_not_know(postgres_dsn: str, statement: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        ask(postgres_dsn, statement)


def test_updated_at_moves_by_itself_with_every_update(postgres_dsn: str) -> None:
    ask(
        postgres_dsn,
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, updated_at) VALUES ('a', 1, '2000-01-01')",
    )
    ask(postgres_dsn, "UPDATE saga.saga_states SET current_step = 1, updated_at = '2000-01-01'")
    assert ask(postgres_dsn, "SELECT updated_at > now() - interval '1 minute' FROM saga.saga_states") == [(True,)]


# --- connections ------------------------------------------------------------------------------------------------------


async def test_a_connection_killed_in_the_middle_of_a_write_is_unavailable_and_the_write_can_be_sent_again(
    postgres_dsn: str,
) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        saga = await running(store)
        record = move(saga, current_step=1, logs=(log_entry(),))
        # Somebody else holds the row, so the write stands in the middle for as long as we like.
        rival = await run_aio(asyncpg.connect(postgres_dsn))
        await run_aio(rival.execute("BEGIN"))
        await run_aio(rival.execute("SELECT 1 FROM saga.saga_states FOR UPDATE"))
        failed = trio.Event()

        async def write() -> None:
            with pytest.raises(Unavailable):
                await store.record(record)
            failed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await kill_waiting(rival)
            await failed.wait()
        await run_aio(rival.execute("ROLLBACK"))
        await run_aio(rival.close())
        recorded = await store.record(record)
        assert recorded.saga.current_step == 1
        assert len(await store.step_logs(saga.saga_id)) == 1


async def kill_waiting(rival: Any) -> None:
    """Ends the server process that waits for the rival's lock, as soon as there is one."""
    sql = """
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND datname = current_database()
    """
    while not await run_aio(rival.fetch(sql)):
        # A transaction sees one state of pg_stat_activity until it is told to look again.
        await run_aio(rival.execute("SELECT pg_stat_clear_snapshot()"))


async def test_idle_connections_that_were_killed_are_replaced(postgres_dsn: str) -> None:
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        saga = await running(store)
        ask(postgres_dsn, kill)
        # Whoever comes first may be the one to notice.
        for attempt in (
            lambda: store.record(move(saga, current_step=1)),
            store.ping,
            lambda: store.release(saga, interrupted=False),
        ):
            for _ in range(2):
                try:
                    await attempt()
                except Unavailable:
                    continue
                break
            else:
                pytest.fail("still unavailable")
        now = await store.get(saga.saga_id)
        assert now is not None
        assert (now.current_step, now.owner) == (1, None)


async def test_a_server_that_is_not_there_is_unavailable(postgres_server: PostgresServer) -> None:
    for dsn in ("postgresql://postgres@127.0.0.1:1/saga", postgres_server.dsn("no_such_database"), "postgresql://%%%"):
        async with open_loop():
            with pytest.raises(Unavailable):
                async with open_postgres(dsn, events=True):
                    pass


async def test_what_was_never_sent_is_not_taken_for_lost() -> None:
    """Hours of a server that is away must not pile up claims to ask for."""
    async with open_loop():
        link = Link("postgresql://postgres@127.0.0.1:1/saga", {})
        with pytest.raises(NothingSent):
            await run_aio(link.exchange(lambda connection: connection.fetchval("SELECT 1")))


async def test_a_cancelled_read_leaves_the_store_usable(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True, max_connections=4) as store:
        for _ in range(20):
            with trio.move_on_after(0):
                await store.count_open()
        assert await store.count_open() == {}


# --- batches ----------------------------------------------------------------------------------------------------------


async def test_nul_in_json_which_jsonb_cannot_hold_is_refused_alone(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        sagas = [await running(store) for _ in range(6)]
        results: dict[str, Recorded | RowRejected] = {}

        async def write(saga: Saga, text: str) -> None:
            try:
                record = move(saga, current_step=1, logs=(log_entry(response_payload={"text": text}),))
                results[saga.saga_id] = await store.record(record)
            except RowRejected as error:
                results[saga.saga_id] = error

        async with trio.open_nursery() as nursery:
            for place, saga in enumerate(sagas):
                nursery.start_soon(write, saga, "nul \0" if place == 3 else "fine")
        refused = [saga.saga_id for saga in sagas if isinstance(results[saga.saga_id], RowRejected)]
        assert refused == [sagas[3].saga_id]
        with pytest.raises(RowRejected):
            await store.create(new_saga(payload={"nul": "\0"}))
        with pytest.raises(RowRejected):
            await store.create(new_saga(initiated_by="nul \0"))


async def test_many_writes_share_one_statement(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        sagas = [await running(store) for _ in range(60)]
        moves = store.lanes[1:]
        before = sum(lane.batches for lane in moves)
        async with trio.open_nursery() as nursery:
            for saga in sagas:
                nursery.start_soon(store.record, move(saga, current_step=1, logs=(log_entry(),)))
        assert sum(lane.batches for lane in moves) - before <= 3


async def test_two_processes_never_claim_the_same_saga(postgres_dsn: str) -> None:
    """Two stores: connections of their own, as in two processes."""
    async with (
        open_loop(),
        open_postgres(postgres_dsn, events=False) as one,
        open_postgres(postgres_dsn, events=False) as other,
    ):
        sagas = [await created(one) for _ in range(40)]
        taken: list[str] = []

        async def claim(store: PostgresStore, worker: str) -> None:
            while claimed := await store.claim_due_sagas(worker, 3):
                taken.extend(entry.saga.saga_id for entry in claimed)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim, one, "worker-1")
            nursery.start_soon(claim, other, "worker-2")
        assert sorted(taken) == sorted(saga.saga_id for saga in sagas)


async def test_a_claim_does_not_wait_for_a_saga_that_another_transaction_holds(postgres_dsn: str) -> None:
    async def hold(connection: Any) -> None:
        await connection.execute("BEGIN")
        await connection.execute("SELECT FROM saga.saga_states WHERE id = $1::uuid FOR UPDATE", held.saga_id)

    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        held, free = await created(store), await created(store)
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(hold))
        with trio.fail_after(5):
            assert [one.saga.saga_id for one in await store.claim_due_sagas(WORKER, 10)] == [free.saga_id]
        await run_aio(other.close())
        assert [one.saga.saga_id for one in await store.claim_due_sagas(WORKER, 10)] == [held.saga_id]


async def hold(saga_id: str, connection: Any) -> None:
    """Begins a transaction that has changed this row, and leaves it open."""
    await connection.execute("BEGIN")
    await connection.execute("UPDATE saga.saga_states SET error_message = 'x' WHERE id = $1::uuid", saga_id)


async def blocked_on_a_lock(dsn: str) -> None:
    """Returns when somebody waits for a row."""
    blocked = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with trio.fail_after(20):
        while not await trio.to_thread.run_sync(ask, dsn, blocked):
            pass


async def test_a_row_that_somebody_has_locked_holds_up_neither_sweeps_nor_leases(postgres_dsn: str) -> None:
    """A person at a prompt, or a worker that stands still."""
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        await store.register_worker(WORKER, 60.0)
        held, free = await created(store, owner="gone"), await created(store, owner="gone")
        mine = await created(store, owner="leaving")
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(partial(hold, held.saga_id)))
        with trio.fail_after(5):
            assert await store.release_expired_workers() == 2
            assert await store.renew_lease(WORKER, 60.0)
        assert [one.saga.saga_id for one in await store.claim_due_sagas("leaving", 9)] == [free.saga_id, mine.saga_id]
        await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
        await run_aio(other.exchange(partial(hold, mine.saga_id)))
        with trio.fail_after(5):
            await store.remove_worker("leaving")
        after = [await store.get(saga.saga_id) for saga in (held, free, mine)]
        assert [saga is not None and saga.owner for saga in after] == ["gone", None, "leaving"]
        # What asks for this very row gives up before the lease, which is behind it, is in danger.
        with trio.fail_after(10):
            with pytest.raises(Unavailable):
                await store.request_cancel_unless_terminal(mine.saga_id)
            assert await store.renew_lease(WORKER, 60.0)
        await run_aio(other.close())
        assert await store.release_expired_workers() == 2


async def test_a_sweep_that_has_seen_old_rows_takes_nothing_from_a_living_worker(postgres_dsn: str) -> None:
    """Two workers sweep after a third has died: the first frees and claims, the second still sees the dead one's."""
    free_abandoned = load(Dialect.POSTGRES)["free_abandoned_sagas"]
    assert "FOR UPDATE SKIP LOCKED" in free_abandoned.text
    # Made to wait at a row, so that what it has seen is old when it comes to the next.
    waiting = free_abandoned.text.replace("SKIP LOCKED", "")
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store, trio.open_nursery() as others:
        await store.register_worker(WORKER, 60.0)
        held, taken = await created(store, owner="gone"), await created(store, owner="gone")
        other, second = Link(postgres_dsn, {}), Link(postgres_dsn, {})
        await run_aio(other.exchange(partial(hold, held.saga_id)))
        others.start_soon(run_aio, second.exchange(lambda connection: connection.fetch(waiting)))
        await blocked_on_a_lock(postgres_dsn)
        assert await store.release_expired_workers() == 1
        (claimed,) = await store.claim_due_sagas(WORKER, 9)
        assert claimed.saga.saga_id == taken.saga_id
        await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
        with trio.fail_after(20):
            while (saga := await store.get(held.saga_id)) is not None and saga.owner is not None:
                pass  # the second sweep has not come to its end
        assert await store.get(taken.saga_id) == claimed.saga
        for link in (other, second):
            await run_aio(link.close())


async def test_a_saga_that_is_given_to_another_while_a_lost_answer_is_made_good_stays_with_it(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READER_SESSION, "lock_timeout", "20000")  # until the machine has noticed that it waits

    async def give_away(connection: Any) -> None:
        await connection.execute("BEGIN")
        await connection.execute("UPDATE saga.saga_states SET owner = 'other', epoch = 2")

    async with open_loop(), open_postgres(postgres_dsn, events=True) as store, trio.open_nursery() as claiming:
        saga = await created(store, owner=WORKER)
        store._lost_claim_ids.update(str(row[0]) for row in ask(postgres_dsn, "SELECT claim_id FROM saga.saga_states"))
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(give_away))
        claiming.start_soon(store.claim_due_sagas, WORKER, 1)
        await blocked_on_a_lock(postgres_dsn)
        await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
        await run_aio(other.close())
        assert await store.claim_due_sagas(WORKER, 1) == []  # after the other, on the same connection
        after = await store.get(saga.saga_id)
        assert after is not None
        assert (after.owner, after.epoch) == ("other", 2)


async def test_the_database_clock_rules_without_another(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=False) as store:
        await store.register_worker(WORKER, 0.0)
        assert not await store.renew_lease(WORKER, 15)
        saga = await running(store)
        saga = (await store.record(move(saga, attempt=2, retry_in_secs=-1, deadline_in_secs=100, release=True))).saga
        (claimed,) = await store.claim_due_sagas(WORKER, 1)
        assert claimed.deadline_in_secs == pytest.approx(100, abs=20)
        assert abs((claimed.saga.updated_at - claimed.saga.created_at).total_seconds()) < 20


# --- the table of errors ----------------------------------------------------------------------------------------------


def error_classes(base: type[BaseException]) -> Iterator[type[BaseException]]:
    for child in base.__subclasses__():
        yield child
        yield from error_classes(child)


def test_every_error_of_the_driver_has_its_place_in_the_table() -> None:
    expected: dict[str, type[Exception] | None] = {
        **dict.fromkeys(("08", "53", "55", "57", "58"), Unavailable),
        **dict.fromkeys(("28", "3D"), StoreRefuses),
        **dict.fromkeys(("22", "23", "54"), RowRejected),
        "40": TryAgain,
    }
    seen = set()
    for kind in set(error_classes(asyncpg.PostgresError)):
        state = getattr(kind, "sqlstate", None)
        if not state or kind in (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError):
            continue
        meaning = translation_of(kind("x"))
        if state[:2] in expected:
            seen.add(state[:2])
            assert meaning is expected[state[:2]], kind
        else:
            assert meaning in (None, Unavailable) or (meaning, state) == (StoreRefuses, "42501"), kind
    assert seen == set(expected)
    for error in (ConnectionRefusedError(), TimeoutError(), EOFError(), asyncpg.InterfaceError("connection is closed")):
        assert translation_of(error) is Unavailable
    for refusal in (asyncpg.InsufficientPrivilegeError("x"), ssl.SSLCertVerificationError("x")):
        assert translation_of(refusal) is StoreRefuses
    for bug in (ZeroDivisionError(), asyncpg.UndefinedTableError("x"), asyncpg.PostgresSyntaxError("x")):
        assert translation_of(bug) is None


async def test_a_transaction_that_had_to_give_way_is_tried_again_and_not_for_ever(postgres_dsn: str) -> None:
    async with open_loop():
        link = Link(postgres_dsn, {})
        tries: list[int] = []

        async def say(connection: Any) -> str:
            tries.append(await connection.fetchval("SELECT pg_backend_pid()"))
            if len(tries) != 3:
                # What the server says to the one of two that a deadlock is solved at the cost of.
                await connection.execute("DO $$ BEGIN RAISE EXCEPTION 'knot' USING ERRCODE = '40P01'; END $$")
            return "done"

        assert await run_aio(link.exchange(say)) == "done"
        assert len(tries) == 3
        assert len(set(tries)) == 1  # the connection was sound all the time
        with pytest.raises(Unavailable, match="give way"):
            await run_aio(link.exchange(say))
        await run_aio(link.close())


async def test_a_connection_on_which_time_ran_out_is_not_used_again(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server process may still be at work on what nobody waits for any more."""
    pid = "SELECT pg_backend_pid()"
    async with open_loop():
        link = Link(postgres_dsn, {})
        before = await run_aio(link.exchange(lambda connection: connection.fetchval(pid)))
        with monkeypatch.context() as patched:
            patched.setattr("store.postgres_connections.EXCHANGE_SECS", 0.05)
            with pytest.raises(Unavailable):
                await run_aio(link.exchange(lambda connection: connection.fetchval("SELECT pg_sleep(60)")))
        after = await run_aio(link.exchange(lambda connection: connection.fetchval(pid)))
        assert after != before
        await run_aio(link.close())


async def test_a_worker_that_stands_still_amid_a_sweep_holds_up_no_other(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP, or a machine that is gone without a word: its connection stays, and with it whatever it has locked."""
    stands_still = trio.Event()

    async def fetch_and_stand_still(connection: Any, query: Query, **parameters: object) -> list[Any]:
        found = await fetch(connection, query, **parameters)
        if query.name == "remove_expired_workers" and not stands_still.is_set():
            stands_still.set()
            await asyncio.sleep(60)
        return found

    async with (
        open_loop(),
        open_postgres(postgres_dsn, events=True) as first,
        open_postgres(postgres_dsn, events=True) as second,
        trio.open_nursery() as others,
    ):
        await first.register_worker("dead", 0.0)
        await second.register_worker(WORKER, 60.0)
        with monkeypatch.context() as patched:
            patched.setattr("store.postgres.fetch", fetch_and_stand_still)
            single_writes = first._single_writes
            patched.setattr(single_writes, "write", single_writes.write_or_give_up)  # so that the test can end
            others.start_soon(first.release_expired_workers)
            await stands_still.wait()
        with trio.fail_after(10):
            await second.release_expired_workers()
            assert await second.renew_lease(WORKER, 60.0)
        others.cancel_scope.cancel()


async def test_the_database_ends_a_transaction_whose_client_stands_still(postgres_dsn: str) -> None:
    async with open_loop():
        for session in (SESSION, WRITER_SESSION, READER_SESSION):
            assert session["idle_in_transaction_session_timeout"] == "5000"
        link = Link(postgres_dsn, {**SESSION, "idle_in_transaction_session_timeout": "50"})
        waiting = Link(postgres_dsn, {})  # as long as it takes

        async def lock(connection: Any, then: Callable[[], Awaitable[object]]) -> None:
            async with connection.transaction():
                await connection.execute("LOCK saga.outbox_partitions")
                await then()
                await connection.execute("SELECT 1")

        async def until_another_has_it() -> None:
            await waiting.exchange(partial(lock, then=partial(asyncio.sleep, 0)))

        with trio.fail_after(10), pytest.raises(Unavailable):
            await run_aio(link.exchange(partial(lock, then=until_another_has_it)))
        assert await run_aio(link.exchange(lambda connection: connection.fetchval("SELECT 1"))) == 1
        await run_aio(link.close())
        await run_aio(waiting.close())


async def test_a_migration_may_take_longer_than_any_exchange(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of millions is rewritten in minutes; cut off, the start would try the same for ever."""
    monkeypatch.setitem(SESSION, "statement_timeout", "1")
    with postgres_server.empty_database() as dsn:
        async with open_loop(), open_postgres(dsn, events=True) as store:
            assert await store.workflows() == []


# --- answers that never come ------------------------------------------------------------------------------------------


class Wire:
    """A TCP line to the server that can lose answers: the request gets through and is done, and nobody is told. Or
    keep them: everything stays open and nothing comes."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.loses_answers = False
        self.keeps_answers = False
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(
                partial(trio.serve_tcp, self._connect, 0, host="127.0.0.1", handler_nursery=nursery)
            )
            self.port = listener.socket.getsockname()[1]
            task_status.started()

    async def _connect(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self._server_port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._forward, client, server, nursery)
            try:
                async for data in server:
                    if self.loses_answers:
                        break
                    if self.keeps_answers:
                        await trio.sleep_forever()
                    await client.send_all(data)
            except trio.BrokenResourceError:
                pass
            nursery.cancel_scope.cancel()

    async def _forward(self, client: trio.SocketStream, server: trio.SocketStream, nursery: trio.Nursery) -> None:
        try:
            async for data in client:
                await server.send_all(data)
        except trio.BrokenResourceError:
            pass
        nursery.cancel_scope.cancel()


async def test_a_write_whose_answer_was_lost_is_known_when_it_is_sent_again(
    postgres_dsn: str, postgres_server: PostgresServer, nursery: trio.Nursery
) -> None:
    wire = Wire(postgres_server.port)
    await nursery.start(wire.run)
    dsn = postgres_dsn.replace(str(postgres_server.port), str(wire.port))
    async with open_loop(), open_postgres(dsn, events=True) as store:
        saga = await running(store)
        record = move(saga, current_step=1, logs=(log_entry(),), retry_in_secs=5)
        wire.loses_answers = True
        with pytest.raises(Unavailable):
            await store.record(record)
        new = new_saga(owner=WORKER)
        with pytest.raises(Unavailable):
            await store.create(new)
        wire.loses_answers = False
        assert (await store.record(record)).saga == await store.get(saga.saga_id)
        assert len(await store.step_logs(saga.saga_id)) == 1
        again = await store.create(new)
        assert again.saga.saga_id == new.saga_id
        assert await store.claim_due_sagas(WORKER, 10) == []
        assert await store.get(new.saga_id) == again.saga
    nursery.cancel_scope.cancel()


async def test_what_a_worker_was_given_by_an_answer_that_was_lost_comes_with_its_next_claim(
    postgres_dsn: str, postgres_server: PostgresServer, nursery: trio.Nursery
) -> None:
    wire = Wire(postgres_server.port)
    await nursery.start(wire.run)
    dsn = postgres_dsn.replace(str(postgres_server.port), str(wire.port))
    async with open_loop(), open_postgres(dsn, events=True) as store:
        known = await running(store)
        await store.claim_due_sagas(WORKER, 1)
        waiting = await created(store)
        wire.loses_answers = True
        with pytest.raises(Unavailable):
            await store.claim_due_sagas(WORKER, 1)
        born = new_saga(owner=WORKER)
        with pytest.raises(Unavailable):
            await store.create(born)
        wire.loses_answers = False
        owners = ask(postgres_dsn, "SELECT count(*) FROM saga.saga_states WHERE owner = $1", WORKER)
        assert owners == [(3,)]  # the database did all of it
        claimed = await store.claim_due_sagas(WORKER, 1)
        assert {one.saga.saga_id for one in claimed} == {waiting.saga_id, born.saga_id}
        assert {one.saga.epoch for one in claimed} == {2}
        assert await store.claim_due_sagas(WORKER, 1) == []
        assert await store.get(known.saga_id) == known
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("after_another", [False, True])
@pytest.mark.parametrize("name", ["renew_lease", "remove_worker"])
async def test_what_keeps_or_ends_a_lease_can_be_given_up_when_no_answer_comes(
    postgres_dsn: str, postgres_server: PostgresServer, nursery: trio.Nursery, name: str, after_another: bool
) -> None:
    """A worker must stop its sagas before its lease ends, and exit in time, also when the database only hangs."""
    wire = Wire(postgres_server.port)
    await nursery.start(wire.run)
    dsn = postgres_dsn.replace(str(postgres_server.port), str(wire.port))
    async with open_loop(), open_postgres(dsn, events=True) as store, trio.open_nursery() as others:
        await store.register_worker(WORKER, 60.0)
        wire.keeps_answers = True
        if after_another:
            others.start_soon(unanswered_claim, store)
            await trio.testing.wait_all_tasks_blocked(0.01)
        arguments = (WORKER, 60.0) if name == "renew_lease" else (WORKER,)
        with trio.fail_after(5), trio.move_on_after(0.1) as scope:
            await getattr(store, name)(*arguments)
        assert scope.cancelled_caught
        wire.keeps_answers = False
        nursery.cancel_scope.cancel()  # the claim ends with its line


async def unanswered_claim(store: PostgresStore) -> None:
    with pytest.raises(Unavailable):
        await store.claim_due_sagas(WORKER, 1)
