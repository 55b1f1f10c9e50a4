"""What workers on one Postgres tell each other, the moment it commits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import asyncpg
import pytest
import trio

from bridge import open_loop, run_aio
from saga.errors import Unavailable
from saga.model import SagaStatus
from saga.ports import CancelAccepted, Notice, NoticesMissed, SagasDue, WorkflowAdded
from store.postgres import PostgresStore, open_postgres
from tests.store.samples import WORKER, created, definition, move, running

Notices = trio.MemoryReceiveChannel[Notice]


@asynccontextmanager
async def listening(store: PostgresStore) -> AsyncIterator[Notices]:
    """What the store is told while the block runs; it listens already."""
    send, receive = trio.open_memory_channel[Notice](1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.listen, send.send_nowait)
        assert await receive.receive() == NoticesMissed()
        yield receive
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def two_workers(dsn: str) -> AsyncIterator[tuple[PostgresStore, Notices]]:
    """The store of one worker, and what another worker's is told."""
    async with open_loop(), open_postgres(dsn, events=True) as store, open_postgres(dsn, events=True) as other:
        await store.register_worker(WORKER, 600)
        async with listening(other) as notices:
            yield store, notices


async def told(store: PostgresStore, notices: Notices, *doings: Awaitable[object]) -> list[Notice]:
    """What is told of these, which happen one after the other; a workflow that is registered behind them ends it."""
    for doing in doings:
        await doing
    last = definition(name="the-last")
    await store.register_workflow(last, "")
    heard = []
    with trio.fail_after(10):
        while (notice := await notices.receive()) != WorkflowAdded(name="the-last"):
            heard.append(notice)
    return heard


async def test_a_saga_without_an_owner_is_told_and_one_with_an_owner_is_not(postgres_dsn: str) -> None:
    async with two_workers(postgres_dsn) as (store, notices):
        assert await told(store, notices, created(store, owner=WORKER), created(store)) == [SagasDue()]


async def test_a_saga_that_is_given_up_is_told_and_one_that_is_parked_or_ended_is_not(postgres_dsn: str) -> None:
    async with two_workers(postgres_dsn) as (store, notices):
        parked, ended, freed, left, opened = [await running(store) for _ in range(5)]
        opened = (await store.record(move(opened, status=SagaStatus.FAILED))).saga
        heard = await told(
            store,
            notices,
            store.record(move(parked, attempt=2, retry_in_secs=60, release=True)),
            store.record(move(ended, status=SagaStatus.COMPLETED, release=True)),
            store.record(move(opened, status=SagaStatus.COMPENSATING, release=True)),
            store.release(freed, interrupted=False),
            store.remove_worker(WORKER),
        )
        assert heard == [SagasDue()] * 3
        assert (await store.get(left.saga_id)).owner is None  # type: ignore[union-attr]  # it is there


async def test_a_cancel_is_told_to_the_owner_and_makes_a_parked_saga_due(postgres_dsn: str) -> None:
    async with two_workers(postgres_dsn) as (store, notices):
        owned, parked, undone = [await running(store) for _ in range(3)]
        await store.record(move(parked, attempt=2, retry_in_secs=60, release=True))
        await store.record(move(undone, status=SagaStatus.COMPENSATING, attempt=2, retry_in_secs=60, release=True))
        heard = await told(
            store,
            notices,
            store.request_cancel_unless_terminal(owned.saga_id),
            store.request_cancel_unless_terminal(owned.saga_id),
            store.request_cancel_unless_terminal(parked.saga_id),
            store.request_cancel_unless_terminal(undone.saga_id),
        )
        assert heard == [CancelAccepted(saga_id=owned.saga_id, owner=WORKER), SagasDue()]


async def test_a_workflow_is_told_when_it_has_a_new_version(postgres_dsn: str) -> None:
    async with two_workers(postgres_dsn) as (store, notices):
        order = definition(name='quo"te \N{SNOWMAN}')
        heard = await told(store, notices, store.register_workflow(order, ""), store.register_workflow(order, ""))
        assert heard == [WorkflowAdded(name='quo"te \N{SNOWMAN}')]


async def test_what_was_rolled_back_is_not_told(postgres_dsn: str) -> None:
    async with two_workers(postgres_dsn) as (store, notices):
        rival = await run_aio(asyncpg.connect(postgres_dsn))
        await run_aio(rival.execute("BEGIN"))
        await run_aio(
            rival.execute("INSERT INTO saga.saga_states (workflow_name, workflow_version) VALUES ('order', 1)")
        )
        await run_aio(rival.execute("ROLLBACK"))
        await run_aio(rival.close())
        assert await told(store, notices) == []


async def test_a_worker_is_not_told_what_it_did_itself(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store, listening(store) as notices:
        saga = await running(store)
        await created(store)
        await store.request_cancel_unless_terminal(saga.saga_id)
        await store.register_workflow(definition(name="own"), "")
        async with open_postgres(postgres_dsn, events=True) as other:
            await created(other)
        with trio.fail_after(10):
            assert await notices.receive() == SagasDue()
        with pytest.raises(trio.WouldBlock):
            notices.receive_nowait()


async def test_a_notice_nobody_understands_is_passed_over(postgres_dsn: str) -> None:
    async with two_workers(postgres_dsn) as (store, notices):
        stranger = await run_aio(asyncpg.connect(postgres_dsn))
        for payload in ("", "{", json.dumps({"type": "from-tomorrow"}), json.dumps({"type": "cancel"})):
            await run_aio(stranger.execute("SELECT pg_notify('saga_notices', $1)", payload))
        await run_aio(stranger.close())
        assert await told(store, notices) == []


async def test_a_listener_that_lost_its_connection_listens_anew_and_says_that_it_may_have_missed_something(
    postgres_dsn: str,
) -> None:
    async with two_workers(postgres_dsn) as (store, notices):
        operator = await run_aio(asyncpg.connect(postgres_dsn))
        ended = await run_aio(
            operator.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE 'LISTEN%'"
            )
        )
        await run_aio(operator.close())
        assert len(ended) == 1
        with trio.fail_after(10):
            assert await notices.receive() == NoticesMissed()
        assert await told(store, notices, created(store)) == [SagasDue()]


async def test_listening_ends_when_it_is_cancelled_though_the_database_is_away(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        store._notices._dsn = "postgresql://postgres@127.0.0.1:1/nowhere"
        with pytest.raises(Unavailable):
            await run_aio(store._notices._listen_until_lost(lambda notice: None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.listen, lambda notice: None)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
