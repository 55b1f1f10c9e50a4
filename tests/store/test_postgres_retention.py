"""The removal of ended sagas on Postgres: one process at a time, nobody waited for, and by the index."""

from __future__ import annotations

import json
from typing import Any

import asyncpg
import trio

from bridge import open_loop, run_aio
from saga.model import Saga, SagaStatus
from saga.ports import Store
from store.postgres import open_postgres
from store.postgres_connections import READER_SESSION, Link
from store.queries import Dialect, load
from tests.store.plans import nodes, rows_read
from tests.store.samples import StandingClock, move, running
from tests.support.postgres import in_plain_loop

DAY = 86_400.0
REMOVE = load(Dialect.POSTGRES)["remove_ended_sagas"]


async def ended_long_ago(store: Store, clock: StandingClock, count: int) -> list[Saga]:
    sagas = [await running(store) for _ in range(count)]
    over = [(await store.record(move(saga, status=SagaStatus.COMPLETED))).saga for saga in sagas]
    clock.advance(2 * DAY)
    return over


async def test_one_process_at_a_time_removes_and_the_others_do_not_wait(postgres_dsn: str) -> None:
    async def remove_uncommitted(connection: Any) -> None:
        values = {"age_secs": DAY, "limit": 1, "now": clock.now()}
        await connection.execute("BEGIN")
        assert len(await connection.fetch(REMOVE.text, *(values[name] for name in REMOVE.parameters))) == 1

    clock = StandingClock()
    async with open_loop(), open_postgres(postgres_dsn, events=False, clock=clock) as store:
        await ended_long_ago(store, clock, 3)
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(remove_uncommitted))
        with trio.fail_after(10):
            assert await store.remove_ended_before(DAY, 10) == 0
            await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
            assert await store.remove_ended_before(DAY, 10) == 2
        await run_aio(other.close())


async def test_a_saga_that_is_just_being_reopened_is_passed_over(postgres_dsn: str) -> None:
    async def reopen_uncommitted(connection: Any) -> None:
        await connection.execute("BEGIN")
        reopen = "UPDATE saga.saga_states SET status = 'COMPENSATING', ended_at = NULL WHERE id = $1::uuid"
        await connection.execute(reopen, reopened.saga_id)

    clock = StandingClock()
    async with open_loop(), open_postgres(postgres_dsn, events=False, clock=clock) as store:
        reopened, other_saga = await ended_long_ago(store, clock, 2)
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(reopen_uncommitted))
        with trio.fail_after(10):
            assert await store.remove_ended_before(DAY, 10) == 1
            await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
            assert await store.remove_ended_before(DAY, 10) == 0
        await run_aio(other.close())
        assert await store.get(other_saga.saga_id) is None
        assert await store.get(reopened.saga_id) is not None


async def test_a_long_removal_holds_up_no_lease(postgres_dsn: str) -> None:
    """It has a connection of the readers; the one for single writes stays free."""

    async def hold(connection: Any) -> None:
        await connection.execute("BEGIN")
        await connection.execute("LOCK TABLE saga.saga_step_logs IN ACCESS EXCLUSIVE MODE")

    clock = StandingClock()
    async with open_loop(), open_postgres(postgres_dsn, events=False, clock=clock) as store:
        await ended_long_ago(store, clock, 1)
        await store.register_worker("w", 15.0)
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(hold))
        async with trio.open_nursery() as nursery:
            removed: list[int] = []

            async def remove() -> None:
                removed.append(await store.remove_ended_before(DAY, 10))

            nursery.start_soon(remove)
            with trio.fail_after(10):
                assert await store.renew_lease("w", 15.0)
                assert await store.request_cancel_unless_terminal("00000000-0000-4000-8000-000000000001") is None
            await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
        await run_aio(other.close())
        assert removed == [1]


KEPT, OLD, LIMIT = 20_000, 300, 100
FILL = f"""
    INSERT INTO saga.saga_states (workflow_name, workflow_version, status, ended_at)
    SELECT 'order', 1, 'COMPLETED', now() FROM generate_series(1, {KEPT});
    INSERT INTO saga.saga_states (workflow_name, workflow_version, status, ended_at)
    SELECT 'order', 1, 'FAILED', now() - interval '40 days' FROM generate_series(1, {OLD});
    INSERT INTO saga.saga_step_logs (saga_id, step_index, step_name, action, status)
    SELECT id, 0, 'a', 'EXECUTE', 'SUCCESS' FROM saga.saga_states;
    INSERT INTO saga.outbox (saga_id, event_type, status, current_step, published_at)
    SELECT id, 'SAGA_STARTED', 'STARTED', 0, now() FROM saga.saga_states
"""


def test_a_batch_reads_only_what_it_removes_and_a_look_in_vain_nothing(postgres_dsn: str) -> None:
    async def explain() -> list[tuple[int, Any]]:
        connection = await asyncpg.connect(postgres_dsn, server_settings=READER_SESSION)
        try:
            await connection.execute(FILL)
            plans = []
            for prepare in ("SELECT 1", "ANALYZE"):  # never analysed, then analysed
                await connection.execute(prepare)
                for days, removed in ((30, LIMIT), (50, 0)):
                    values = {"age_secs": days * DAY, "limit": LIMIT, "now": None}
                    await connection.execute("BEGIN")
                    text = f"EXPLAIN (ANALYZE, FORMAT JSON) {REMOVE.text}"
                    (found,) = await connection.fetch(text, *(values[name] for name in REMOVE.parameters))
                    await connection.execute("ROLLBACK")
                    plans.append((removed, json.loads(found[0])[0]["Plan"]))
            return plans
        finally:
            await connection.close()

    for removed, plan in in_plain_loop(explain):
        scans = [node for node in nodes(plan) if "Relation Name" in node and node["Node Type"] != "ModifyTable"]
        assert {node["Relation Name"] for node in scans} == {"saga_states", "outbox"}
        assert "Seq Scan" not in {node["Node Type"] for node in scans}, plan
        assert max(rows_read(node) for node in scans) == removed, plan
