"""Migrations: numbered files, applied in order, each in one transaction, and what of them a database has.

The files are `sql/<dialect>/NNN_name.up.sql` and `.down.sql`. This module decides which run; how a database locks,
executes a whole file and notes it is behind `MigrationTarget`, kept by `postgres_migrations` and `sqlite_migrations`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import NamedTuple

from saga.ports import SchemaState
from store.errors import MigrationChanged, MigrationError, SchemaNewer
from store.queries import Dialect, folder

FILE_NAME = re.compile(r"(?P<number>\d{3})_(?P<name>[a-z0-9_]+)\.(?P<direction>up|down)\.sql")


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema. `checksum` is of the up file: what was applied must stay what it says."""

    number: int
    name: str
    up: str
    down: str
    checksum: str


@dataclass(frozen=True, slots=True)
class Applied:
    """A row of schema_migrations."""

    number: int
    name: str
    checksum: str
    applied_at: datetime


class MigrationStatus(NamedTuple):
    """One known migration; `applied_at` None: not yet."""

    number: int
    name: str
    applied_at: datetime | None


@cache
def migrations(dialect: Dialect) -> tuple[Migration, ...]:
    """All migrations of a dialect, in order. ValueError: numbers have gaps, or a file lacks its other half."""
    texts: dict[int, dict[str, str]] = {}
    names: dict[int, str] = {}
    for file in folder(dialect).iterdir():
        match = FILE_NAME.fullmatch(file.name)
        if match is None:
            continue
        number = int(match["number"])
        if names.setdefault(number, match["name"]) != match["name"]:
            raise ValueError(f"migration {number:03} has two names")
        texts.setdefault(number, {})[match["direction"]] = file.read_text(encoding="utf-8")
    found = []
    for place, number in enumerate(sorted(texts), start=1):
        halves = texts[number]
        if number != place or set(halves) != {"up", "down"}:
            raise ValueError(f"{dialect}: migration {number:03}: a number or a half is missing")
        checksum = hashlib.sha256(halves["up"].encode()).hexdigest()
        found.append(Migration(number, names[number], halves["up"], halves["down"], checksum))
    return tuple(found)


def check_applied(known: Sequence[Migration], applied: Sequence[Applied]) -> None:
    """Raises `SchemaNewer` or `MigrationChanged` if the database does not stem from the files at hand."""
    by_number = {migration.number: migration for migration in known}
    for row in applied:
        migration = by_number.get(row.number)
        if migration is None:
            raise SchemaNewer(
                f"the database has migration {row.number:03}_{row.name}, this release knows migrations up to"
                f" {len(known):03}: use the release that migrated it, or a newer one"
            )
        if (migration.name, migration.checksum) != (row.name, row.checksum):
            raise MigrationChanged(f"migration {row.number:03}_{row.name} was applied from another text than this one")
    if [row.number for row in applied] != list(range(1, len(applied) + 1)):
        raise MigrationError("schema_migrations has gaps")


def schema_state(known: Sequence[Migration], applied: Sequence[Applied]) -> SchemaState:
    """How what was applied stands to the files at hand."""
    try:
        check_applied(known, applied)
    except SchemaNewer:
        return SchemaState.NEWER
    except MigrationError:
        return SchemaState.CHANGED
    return SchemaState.OLDER if len(applied) < len(known) else SchemaState.CURRENT


def pending_up(known: Sequence[Migration], applied: Sequence[Applied]) -> Sequence[Migration]:
    """What is still to be applied, in order."""
    check_applied(known, applied)
    return known[len(applied) :]


def pending_down(known: Sequence[Migration], applied: Sequence[Applied], to: int | None) -> Sequence[Migration]:
    """What is to be taken back, the newest first: down to version `to`, or one step where it is None.

    `MigrationError`: the database is below `to` already.
    """
    check_applied(known, applied)
    target = max(len(applied) - 1, 0) if to is None else to
    if not 0 <= target <= len(applied):
        raise MigrationError(f"cannot go down to {target:03}: the database is at {len(applied):03}")
    return tuple(reversed(known[target : len(applied)]))


def statuses(known: Sequence[Migration], applied: Sequence[Applied]) -> list[MigrationStatus]:
    """Every known migration with the instant it was applied."""
    check_applied(known, applied)
    instants = {row.number: row.applied_at for row in applied}
    return [MigrationStatus(entry.number, entry.name, instants.get(entry.number)) for entry in known]
