"""Migrations on Postgres: a whole file as one simple query, in one transaction, under an advisory lock.

Asyncio-flavoured, over one connection; `postgres.py` crosses into it once.
"""

from __future__ import annotations

from saga.ports import SchemaState
from store.errors import MigrationError
from store.migrations import Applied, MigrationStatus, check_applied, migrations, pending_down, pending_up, statuses
from store.migrations import schema_state as migrations_state
from store.postgres_connections import Connection
from store.queries import Dialect, load

_QUERIES = load(Dialect.POSTGRES)


async def migrate_up(connection: Connection) -> list[int]:
    """Applies what is missing; returns the numbers. Safe beside another process that does the same: the advisory lock
    lasts until this connection is closed."""
    await connection.execute(_QUERIES["lock_migrations"].text)
    if not await connection.fetchval(_QUERIES["schema_migrations_exist"].text):
        # Only now: a server whose user may not create anything starts on a database that is up to date.
        await connection.execute(_QUERIES["create_saga_schema"].text)
        await connection.execute(_QUERIES["create_schema_migrations"].text)
    missing = pending_up(migrations(Dialect.POSTGRES), await _applied(connection))
    for step in missing:
        async with connection.transaction():
            await connection.execute(step.up)
            await connection.execute(_QUERIES["add_migration"].text, step.number, step.name, step.checksum)
    return [step.number for step in missing]


async def migrate_down(connection: Connection, to: int | None = None) -> list[int]:
    """Takes back one migration, or all above version `to`; returns the numbers, in order. `MigrationError`: workers
    run on the database."""
    await connection.execute(_QUERIES["lock_migrations"].text)
    if await connection.fetchval(_QUERIES["workers_exist"].text):
        workers = await connection.fetchval(_QUERIES["count_live_workers"].text)
        if workers:
            raise MigrationError(f"{workers} worker(s) run on this database: stop them first")
    steps = pending_down(migrations(Dialect.POSTGRES), await _applied(connection), to)
    for step in steps:
        async with connection.transaction():
            await connection.execute(step.down)
            await connection.execute(_QUERIES["remove_migration"].text, step.number)
    return [step.number for step in steps]


async def migration_status(connection: Connection) -> list[MigrationStatus]:
    """Every known migration with the instant it was applied; changes nothing."""
    return statuses(migrations(Dialect.POSTGRES), await _applied(connection))


async def require_current(connection: Connection) -> None:
    """Raises `MigrationError` unless every migration is applied."""
    known, applied = migrations(Dialect.POSTGRES), await _applied(connection)
    check_applied(known, applied)
    if len(applied) < len(known):
        raise MigrationError(f"the database is at {len(applied):03}, this release needs {len(known):03}: migrate up")


async def schema_state(connection: Connection) -> SchemaState:
    """How what was applied stands to this release."""
    return migrations_state(migrations(Dialect.POSTGRES), await _applied(connection))


async def _applied(connection: Connection) -> list[Applied]:
    if not await connection.fetchval(_QUERIES["schema_migrations_exist"].text):
        return []
    rows = await connection.fetch(_QUERIES["applied_migrations"].text)
    return [Applied(row["version"], row["name"], row["checksum"], row["applied_at"]) for row in rows]
