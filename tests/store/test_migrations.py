"""Migrating up, down and again, on both databases, by address as the CLI does."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import trio

from store import schema, sqlite_migrations
from store.errors import MigrationChanged, MigrationError, SchemaNewer, StoreInUse
from store.migrations import migrations
from store.queries import Dialect
from store.sqlite import open_sqlite
from tests.support.postgres import PostgresServer, in_plain_loop

NUMBERS = [migration.number for migration in migrations(Dialect.SQLITE)]

POSTGRES_SHAPE = """
SELECT format('%s.%s %s %s %s', table_name, column_name, data_type, is_nullable, column_default) AS shape
FROM information_schema.columns WHERE table_schema = 'saga'
UNION SELECT indexdef FROM pg_indexes WHERE schemaname = 'saga'
UNION SELECT format('%s %s', conname, pg_get_constraintdef(oid)) FROM pg_constraint
      WHERE connamespace = 'saga'::regnamespace
UNION SELECT pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
      WHERE c.relnamespace = 'saga'::regnamespace AND NOT t.tgisinternal
UNION SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'saga'::regnamespace
ORDER BY 1
"""


@pytest.fixture(params=["postgres", "sqlite"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield str(tmp_path / "saga.db")
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    with server.empty_database() as dsn:
        yield dsn


def ask(address: str, sql: str) -> list[str]:
    """The first column of what a statement gives."""
    if not schema.is_postgres(address):
        connection = sqlite3.connect(address, isolation_level=None)
        try:
            return [str(row[0]) for row in connection.execute(sql)]
        finally:
            connection.close()

    async def body() -> list[Any]:
        connection = await asyncpg.connect(address)
        try:
            return list(await connection.fetch(sql))
        finally:
            await connection.close()

    return [str(row[0]) for row in in_plain_loop(body)]


def shape(address: str) -> list[str]:
    """Everything a database says of its tables."""
    sqlite = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY sql"
    return ask(address, POSTGRES_SHAPE if schema.is_postgres(address) else sqlite)


def table(address: str, name: str) -> str:
    return f"saga.{name}" if schema.is_postgres(address) else name


async def test_up_down_to_nothing_and_up_again_gives_the_same_schema(address: str) -> None:
    assert await schema.migrate_up(address) == NUMBERS
    once = shape(address)
    assert await schema.migrate_up(address) == []
    assert await schema.migrate_down(address, 0) == NUMBERS[::-1]
    bare = shape(address)
    assert not [line for line in bare if "saga_states" in line or "outbox" in line or "function" in line.lower()]
    assert await schema.migrate_up(address) == NUMBERS
    assert shape(address) == once


async def test_down_takes_one_step_unless_told_how_far(address: str) -> None:
    await schema.migrate_up(address)
    assert await schema.migrate_down(address) == [NUMBERS[-1]]
    assert await schema.migrate_down(address, 1) == NUMBERS[-2:0:-1]
    assert await schema.migrate_up(address) == NUMBERS[1:]
    with pytest.raises(MigrationError):
        await schema.migrate_down(address, 99)
    assert await schema.migrate_down(address, 0) == NUMBERS[::-1]
    assert await schema.migrate_down(address) == []


async def test_status_names_every_migration_and_when_it_was_applied(address: str) -> None:
    before = await schema.migration_status(address)
    assert [(entry.number, entry.applied_at) for entry in before] == [(number, None) for number in NUMBERS]
    await schema.migrate_up(address)
    await schema.migrate_down(address)
    after = await schema.migration_status(address)
    assert [entry.applied_at is None for entry in after] == [False] * (len(NUMBERS) - 1) + [True]
    assert after[0].name == "sagas"
    assert after[0].applied_at is not None
    assert after[0].applied_at.tzinfo is not None


def test_asking_for_the_status_of_a_file_that_is_not_there_does_not_make_it(tmp_path: Path) -> None:
    trio.run(schema.migration_status, str(tmp_path / "none.db"))
    assert list(tmp_path.iterdir()) == []


async def test_a_database_newer_than_the_code_is_refused(address: str) -> None:
    await schema.migrate_up(address)
    values = "VALUES (99, 'from_tomorrow', 'x', '2031-01-01T00:00:00.000000Z')"
    ask(address, f"INSERT INTO {table(address, 'schema_migrations')} (version, name, checksum, applied_at) {values}")
    for call in (schema.migrate_up, schema.migrate_down, schema.migration_status):
        with pytest.raises(SchemaNewer, match="099_from_tomorrow"):
            await call(address)


async def test_a_migration_that_was_changed_after_it_was_applied_is_refused(address: str) -> None:
    await schema.migrate_up(address)
    ask(address, f"UPDATE {table(address, 'schema_migrations')} SET checksum = 'x' WHERE version = 2")
    with pytest.raises(MigrationChanged, match="002_workflow_definitions"):
        await schema.migrate_up(address)


def test_a_postgres_that_many_migrate_at_once_is_migrated_once(postgres_server: PostgresServer) -> None:
    with postgres_server.empty_database() as dsn:
        results: list[list[int]] = []

        async def one() -> None:
            results.append(await schema.migrate_up(dsn))

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(one)

        trio.run(main)
        assert sorted(results) == [[], [], [], NUMBERS]


def test_an_sqlite_file_that_many_migrate_at_once_is_migrated_once(tmp_path: Path) -> None:
    """Below the lock file, which would let only one in: the database's own lock has to do."""
    results: list[list[int]] = []

    def one() -> None:
        connection = sqlite3.connect(tmp_path / "saga.db", isolation_level=None, timeout=20)
        try:
            connection.create_function("clock_timestamp", 0, lambda: "2030-01-01T00:00:00.000000Z")
            results.append(sqlite_migrations.migrate_up(connection))
        finally:
            connection.close()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(trio.to_thread.run_sync, one)

    trio.run(main)
    assert sorted(number for result in results for number in result) == NUMBERS


async def test_a_server_that_has_the_file_open_keeps_migrations_out_but_not_questions(tmp_path: Path) -> None:
    path = str(tmp_path / "saga.db")
    async with open_sqlite(path, events=False):
        with pytest.raises(StoreInUse):
            await schema.migrate_down(path)
        assert len(await schema.migration_status(path)) == len(NUMBERS)


async def test_a_store_told_not_to_migrate_refuses_a_schema_that_is_behind(tmp_path: Path) -> None:
    path = str(tmp_path / "saga.db")
    await schema.migrate_up(path)
    await schema.migrate_down(path)
    with pytest.raises(MigrationError, match="migrate up"):
        async with open_sqlite(path, events=False, migrate=False):
            pass


def test_a_semicolon_in_a_literal_a_comment_or_a_trigger_does_not_end_a_statement() -> None:
    script = """
    -- first; not yet
    CREATE TABLE a (x TEXT DEFAULT ';'); CREATE TABLE b (y TEXT);
    CREATE TRIGGER t AFTER INSERT ON a BEGIN
        INSERT INTO b VALUES ('one;');
        INSERT INTO b VALUES (new.x);
    END;
    -- the end; really
    """
    statements = list(sqlite_migrations.split_statements(script))
    assert len(statements) == 3
    connection = sqlite3.connect(":memory:")
    for statement in statements:
        connection.execute(statement)
    connection.execute("INSERT INTO a VALUES ('two')")
    assert connection.execute("SELECT y FROM b").fetchall() == [("one;",), ("two",)]
    connection.close()
    with pytest.raises(MigrationError):
        list(sqlite_migrations.split_statements("CREATE TABLE a (x TEXT); DROP TABLE"))
