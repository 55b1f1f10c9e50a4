"""Sagas that have ended cost the undo debt nothing, however many: the plans of both databases."""

from __future__ import annotations

import json
from typing import Any

import asyncpg

from store.instants import seconds_between
from store.postgres_connections import READER_SESSION
from store.queries import Dialect, load
from store.sqlite_connections import MEMORY, opened_connection
from store.sqlite_migrations import migrate_up
from tests.store.plans import hundreds_of_steps, nodes, rows_read
from tests.support.postgres import in_plain_loop

ENDED, OWING = 20_000, 20
"""What is counted is rows read, so a hundred thousand would show no more."""

FILL_POSTGRES = f"""
    INSERT INTO saga.saga_states (workflow_name, workflow_version, status, ended_at)
    SELECT 'order', 1, 'FAILED', now() FROM generate_series(1, {ENDED});
    INSERT INTO saga.saga_states (workflow_name, workflow_version, status, undo_plan, undo_since)
    SELECT 'order', 1, 'COMPENSATING', '[0]', now() - interval '1 hour' FROM generate_series(1, {OWING})
"""


def test_the_undo_debt_on_postgres_reads_no_saga_that_owes_nothing(postgres_dsn: str) -> None:
    query = load(Dialect.POSTGRES)["undo_debt"]

    async def explain() -> list[Any]:
        connection = await asyncpg.connect(postgres_dsn, server_settings=READER_SESSION)
        try:
            await connection.execute(FILL_POSTGRES)
            plans = []
            for prepare in ("SELECT 1", "ANALYZE saga.saga_states"):  # never analysed, then analysed
                await connection.execute(prepare)
                found = await connection.fetchval("EXPLAIN (ANALYZE, FORMAT JSON) " + query.text, None)
                plans.append(json.loads(found)[0]["Plan"])
            (owed,) = await connection.fetch(query.text, None)
            assert (owed["workflow_name"], owed["failed"], owed["pending"]) == ("order", 0, OWING)
            assert owed["oldest_secs"] > 3599
            return plans
        finally:
            await connection.close()

    for plan in in_plain_loop(explain):
        scans = [node for node in nodes(plan) if node.get("Relation Name") == "saga_states"]
        assert sum(rows_read(node) for node in scans) == OWING, plan


def test_the_undo_debt_on_sqlite_reads_no_saga_that_owes_nothing() -> None:
    query = load(Dialect.SQLITE)["undo_debt"]
    with opened_connection(MEMORY) as connection:
        connection.create_function("seconds_between", 2, seconds_between)
        migrate_up(connection)
        connection.execute(
            f"""
            WITH RECURSIVE counted (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < {ENDED})
            INSERT INTO saga_states (id, workflow_name, workflow_version, status, created_at, updated_at, ended_at)
            SELECT printf('00000000-0000-4000-8000-%012x', n), 'order', 1, 'FAILED', '2020-01-01T00:00:00.000000Z',
                   '2020-01-01T00:00:00.000000Z', '2020-01-01T00:00:00.000000Z'
            FROM counted
            """
        )
        for prepare in ("SELECT 1", "ANALYZE"):
            connection.execute(prepare)
            plan = [row["detail"] for row in connection.execute("EXPLAIN QUERY PLAN " + query.text, {"now": None})]
            assert any("USING INDEX idx_saga_states_undo_since" in line for line in plan), plan
        # The proof by counting: the machine's own steps when nobody owes anything.
        assert hundreds_of_steps(connection, query.text, {"now": None}) < 10
