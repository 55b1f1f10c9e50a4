"""`saga migrate`: the schema of whichever store the configuration names. No server runs here."""

from __future__ import annotations

import trio

from saga.errors import Unavailable
from server.config import Config
from server.errors import CannotStart, refused_by_database
from store import schema
from store.errors import MigrationError, StoreRefuses
from store.migrations import MigrationStatus


def migrate(config: Config, direction: str, to: int | None) -> list[MigrationStatus]:
    """Moves the schema `up` (all), `down` (one step, or until `to` is the newest) or not at all (`status`); where it
    stands then. `CannotStart`: the database is away, in use, or does not fit."""
    if config.database is not None:
        address = config.database.dsn()
    elif config.saga.in_memory:
        raise CannotStart("saga.data_dir: a store in memory has no schema to migrate")
    else:
        address = str(config.saga.database_file)
    try:
        if direction == "up":
            trio.run(schema.migrate_up, address)
        elif direction == "down":
            trio.run(schema.migrate_down, address, to)
        return trio.run(schema.migration_status, address)
    except StoreRefuses as error:
        raise refused_by_database(error) from error
    except (MigrationError, Unavailable) as error:
        raise CannotStart(str(error)) from error
