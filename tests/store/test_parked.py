"""100,000 parked sagas cost a claim nothing: the plans of both databases, and the order of what is due."""

from __future__ import annotations

import json
from typing import Any

import asyncpg

from saga.model import SagaStatus
from saga.ports import Store
from store.postgres_connections import READER_SESSION
from store.queries import Dialect, load
from store.sqlite_connections import MEMORY, opened_connection
from store.sqlite_migrations import migrate_up
from tests.store.plans import hundreds_of_steps, nodes, rows_read
from tests.store.samples import WORKER, StandingClock, created, move, running
from tests.support.postgres import in_plain_loop

PARKED, DUE, LIMIT = 100_000, 20, 10

FILL_POSTGRES = f"""
    INSERT INTO saga.saga_states (workflow_name, workflow_version, status, created_at, next_attempt_at)
    SELECT 'order', 1, 'RUNNING', now() - interval '1 day', now() + interval '1 hour'
    FROM generate_series(1, {PARKED});
    INSERT INTO saga.saga_states (workflow_name, workflow_version, status, next_attempt_at)
    SELECT 'order', 1, 'RUNNING', now() - interval '1 minute' FROM generate_series(1, {DUE});
    INSERT INTO saga.saga_states (workflow_name, workflow_version) SELECT 'order', 1 FROM generate_series(1, {DUE})
"""


def test_a_claim_on_postgres_reads_no_saga_that_is_parked(postgres_dsn: str) -> None:
    claim = load(Dialect.POSTGRES)["claim_due_sagas"]
    values = {
        "worker_id": WORKER,
        "limit": LIMIT,
        "now": None,
        "claim_id": "00000000-0000-4000-8000-000000000001",
        "lost_claim_ids": [],
    }

    async def explain() -> list[Any]:
        connection = await asyncpg.connect(postgres_dsn, server_settings=READER_SESSION)
        try:
            await connection.execute(FILL_POSTGRES)
            plans = []
            for prepare in ("SELECT 1", "ANALYZE saga.saga_states"):  # never analysed, then analysed
                await connection.execute(prepare)
                await connection.execute("BEGIN")
                found = await connection.fetchval(
                    "EXPLAIN (ANALYZE, FORMAT JSON) " + claim.text, *(values[name] for name in claim.parameters)
                )
                await connection.execute("ROLLBACK")
                plans.append(json.loads(found)[0]["Plan"])
            return plans
        finally:
            await connection.close()

    for plan in in_plain_loop(explain):
        scans = [
            node for node in nodes(plan) if node.get("Relation Name") == "saga_states" and "Scan" in node["Node Type"]
        ]
        assert {node["Node Type"] for node in scans} <= {"Index Scan", "Index Only Scan"}
        assert {"idx_saga_states_claimable", "idx_saga_states_parked"} <= {node["Index Name"] for node in scans}
        assert sum(rows_read(node) for node in scans) <= 10 * DUE


def test_a_claim_on_sqlite_reads_no_saga_that_is_parked() -> None:
    claim = load(Dialect.SQLITE)["claim_due_sagas"]
    with opened_connection(MEMORY) as connection:
        connection.create_function("after_secs", 2, lambda instant, secs: instant)
        connection.create_function("seconds_between", 2, lambda start, end: 0.0)
        migrate_up(connection)
        connection.execute(
            f"""
            WITH RECURSIVE counted (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < {PARKED})
            INSERT INTO saga_states (id, workflow_name, workflow_version, status, payload, created_at, updated_at,
                                     next_attempt_at)
            SELECT printf('00000000-0000-4000-8000-%012x', n), 'order', 1, 'RUNNING', '{{}}',
                   '2020-01-01T00:00:00.000000Z', '2020-01-01T00:00:00.000000Z', '2099-01-01T00:00:00.000000Z'
            FROM counted
            """
        )
        values = dict.fromkeys(claim.parameters) | {"worker_id": WORKER, "limit": LIMIT}
        for prepare in ("SELECT 1", "ANALYZE"):
            connection.execute(prepare)
            plan = [row["detail"] for row in connection.execute("EXPLAIN QUERY PLAN " + claim.text, values)]
            reads = [line for line in plan if "saga_states" in line]
            assert any("USING INDEX idx_saga_states_claimable" in line for line in reads), plan
            assert any("USING INDEX idx_saga_states_parked (next_attempt_at<?)" in line for line in reads), plan
            assert not [line for line in reads if line.startswith("SCAN") and "USING INDEX" not in line], plan
        # The proof by counting: the machine's own steps for a claim that finds nothing.
        assert hundreds_of_steps(connection, claim.text, values) < 10


async def test_of_those_that_wait_and_those_whose_time_has_come_the_oldest_goes_first(
    store: Store, clock: StandingClock
) -> None:
    expected = []
    for number in range(6):
        if number % 2:
            saga = await created(store)
        else:
            saga = await running(store)
            # The older, the later it is due: the order is that of creation all the same.
            record = move(saga, status=SagaStatus.RUNNING, attempt=2, retry_in_secs=60.0 - 8 * number, release=True)
            saga = (await store.record(record)).saga
        expected.append(saga.saga_id)
        clock.advance(1)
    clock.advance(60)
    claimed = [(await store.claim_due_sagas(WORKER, 1))[0].saga.saga_id for _ in expected]
    assert claimed == expected
