"""`saga migrate`: the schema of either store, up, down, or where it stands. No server runs here."""

from __future__ import annotations

import asyncio
from pathlib import Path

from saga.errors import Unavailable
from server.config import Config
from server.errors import CannotStart
from store import postgres_migrations, sqlite_migrations
from store.errors import MigrationError
from store.migrations import MigrationStatus
from store.postgres import connect
from store.postgres_errors import translated
from store.sqlite import locked, opened_connection


def migrate(config: Config, direction: str, to: int | None) -> list[MigrationStatus]:
    """Moves the schema `up` (all), `down` (one step, or until `to` is the newest) or not at all (`status`); where it
    stands then. `CannotStart`: the database is away, in use, or does not fit."""
    try:
        if config.database is not None:
            # Not asyncio.run: importing trio_asyncio has put its own loop in that place, which needs Trio.
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                return runner.run(_migrate_postgres(config.database.dsn(), direction, to))
        if config.saga.in_memory:
            raise CannotStart("saga.data_dir: a store in memory has no schema to migrate")
        return _migrate_sqlite(config.saga.database_file, direction, to)
    except (MigrationError, Unavailable) as error:
        raise CannotStart(str(error)) from error


async def _migrate_postgres(dsn: str, direction: str, to: int | None) -> list[MigrationStatus]:
    with translated():
        connection = await connect(dsn)
        try:
            if direction == "up":
                await postgres_migrations.migrate_up(connection)
            elif direction == "down":
                await postgres_migrations.migrate_down(connection, to)
            return await postgres_migrations.migration_status(connection)
        finally:
            await connection.close()


def _migrate_sqlite(file: Path, direction: str, to: int | None) -> list[MigrationStatus]:
    with locked(file), opened_connection(file) as connection:
        if direction == "up":
            sqlite_migrations.migrate_up(connection)
        elif direction == "down":
            sqlite_migrations.migrate_down(connection, to)
        return sqlite_migrations.migration_status(connection)
