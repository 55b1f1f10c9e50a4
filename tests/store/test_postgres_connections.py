"""Connections to Postgres: lost, given up, held up, replaced; and what the driver's errors become."""

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
from store.errors import StoreRefuses
from store.postgres import open_postgres
from store.postgres_connections import READER_SESSION, SESSION, WRITER_SESSION, Link, fetch
from store.postgres_errors import NothingSent, TryAgain, translation_of
from store.queries import Query
from tests.store.samples import WORKER, log_entry, move, running
from tests.support.postgres import PostgresServer, ask

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
