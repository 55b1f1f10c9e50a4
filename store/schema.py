"""Migrating a database by its address, whichever kind it is: what `saga migrate up|down|status` calls.

Trio functions that need nothing running: `trio.run(schema.migrate_up, address)`. An address is a `postgresql://` DSN or
the path of an SQLite file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio

from bridge import open_loop, run_aio
from saga.errors import SagaError
from store import postgres_migrations, sqlite_migrations
from store.migrations import MigrationStatus
from store.postgres_connections import MIGRATION_SESSION, Connection, connect
from store.postgres_errors import translated
from store.sqlite_connections import locked, opened_connection, translated_sqlite

T = TypeVar("T")


def is_postgres(address: str) -> bool:
    """Whether an address is a DSN; otherwise it is the path of a file."""
    return address.startswith(("postgresql://", "postgres://"))


async def migrate_up(address: str) -> list[int]:
    """Applies what is missing; returns the numbers. `MigrationError`: schema and code do not fit. `Unavailable`: the
    database cannot be reached, or (a file) a server has it open."""
    if is_postgres(address):
        return await _on_postgres(address, postgres_migrations.migrate_up)
    return await trio.to_thread.run_sync(_on_file, address, True, sqlite_migrations.migrate_up)


async def migrate_down(address: str, to: int | None = None) -> list[int]:
    """Takes back the newest migration, or all above version `to`, data included; returns the numbers, in order. Errors
    as `migrate_up`."""
    if is_postgres(address):
        return await _on_postgres(address, lambda connection: postgres_migrations.migrate_down(connection, to))
    return await trio.to_thread.run_sync(
        _on_file, address, True, lambda connection: sqlite_migrations.migrate_down(connection, to)
    )


async def migration_status(address: str) -> list[MigrationStatus]:
    """Every known migration, in order, with the instant it was applied. Changes nothing, also beside a running server.
    Errors as `migrate_up`."""
    if is_postgres(address):
        return await _on_postgres(address, postgres_migrations.migration_status)
    return await trio.to_thread.run_sync(_on_file, address, False, sqlite_migrations.migration_status)


async def _on_postgres(dsn: str, say: Callable[[Connection], Awaitable[T]]) -> T:
    async def body() -> T:
        with translated():
            connection = await connect(dsn, MIGRATION_SESSION)
            try:
                return await say(connection)
            finally:
                await connection.close()

    answers: list[T] = []
    errors: list[SagaError] = []
    async with open_loop():
        # Caught in here: what leaves the loop's nurseries is wrapped in groups.
        try:
            answers.append(await run_aio(body()))
        except SagaError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return answers[0]


def _on_file(path: str, alone: bool, say: Callable[[sqlite3.Connection], T]) -> T:
    with translated_sqlite():
        if not alone:
            if not Path(path).exists():
                # Opening would make the file; a question must not.
                with opened_connection(":memory:") as connection:
                    return say(connection)
            with opened_connection(path) as connection:
                return say(connection)
        with locked(Path(path)), opened_connection(path) as connection:
            return say(connection)
