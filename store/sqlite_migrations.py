"""Migrations on SQLite: a whole file in one transaction, under the write lock of the database.

Plain blocking functions over one connection; `sqlite.py` and the CLI call them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from saga.ports import SchemaState
from store.errors import MigrationError
from store.instants import from_text
from store.migrations import Applied, MigrationStatus, check_applied, migrations, pending_down, pending_up, statuses
from store.migrations import schema_state as migrations_state
from store.queries import Dialect, load

_QUERIES = load(Dialect.SQLITE)


def migrate_up(connection: sqlite3.Connection) -> list[int]:
    """Applies what is missing; returns the numbers. Safe beside another process that does the same."""
    connection.execute(_QUERIES["create_schema_migrations"].text)
    known = migrations(Dialect.SQLITE)
    done: list[int] = []
    while True:
        # What is missing is asked again under the lock each time: another process may have been faster.
        connection.execute("BEGIN IMMEDIATE")
        try:
            missing = pending_up(known, _applied(connection))
            if missing:
                step = missing[0]
                for statement in split_statements(step.up):
                    connection.execute(statement)
                row = {"version": step.number, "name": step.name, "checksum": step.checksum}
                connection.execute(_QUERIES["add_migration"].text, row)
                done.append(step.number)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        if not missing:
            return done


def migrate_down(connection: sqlite3.Connection, to: int | None = None) -> list[int]:
    """Takes back one migration, or all above version `to`; returns the numbers, in order."""
    known = migrations(Dialect.SQLITE)
    done: list[int] = []
    if not _exists(connection):
        return done
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in pending_down(known, _applied(connection), to):
            for statement in split_statements(step.down):
                connection.execute(statement)
            connection.execute(_QUERIES["remove_migration"].text, {"version": step.number})
            done.append(step.number)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return done


def migration_status(connection: sqlite3.Connection) -> list[MigrationStatus]:
    """Every known migration with the instant it was applied; changes nothing."""
    return statuses(migrations(Dialect.SQLITE), _applied(connection) if _exists(connection) else [])


def require_current(connection: sqlite3.Connection) -> None:
    """Raises `MigrationError` unless every migration is applied."""
    applied = _applied(connection) if _exists(connection) else []
    known = migrations(Dialect.SQLITE)
    check_applied(known, applied)
    if len(applied) < len(known):
        raise MigrationError(f"the database is at {len(applied):03}, this release needs {len(known):03}: migrate up")


def schema_state(connection: sqlite3.Connection) -> SchemaState:
    """How what was applied stands to this release."""
    return migrations_state(migrations(Dialect.SQLITE), _applied(connection) if _exists(connection) else [])


def split_statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one. SQLite itself says where one ends, so a semicolon in a literal, a
    comment or a trigger does not cut. (`executescript` would commit the transaction it is called in.)"""
    start = 0
    at = script.find(";")
    while at >= 0:
        statement = script[start : at + 1]
        if sqlite3.complete_statement(statement):
            yield statement
            start = at + 1
        at = script.find(";", at + 1)
    if script[start:].strip() and not all(line.startswith("--") for line in script[start:].strip().splitlines()):
        raise MigrationError(f"a statement has no end: {script[start:].strip()[:60]}")


def _exists(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute(_QUERIES["schema_migrations_exist"].text).fetchone()[0])


def _applied(connection: sqlite3.Connection) -> list[Applied]:
    rows = connection.execute(_QUERIES["applied_migrations"].text).fetchall()
    return [Applied(row[0], row[1], row[2], from_text(row[3])) for row in rows]
