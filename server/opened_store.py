"""Opens the store a configuration names: Postgres, waited for while it is away, or an SQLite file."""

from __future__ import annotations

import logging
import socket
import stat
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from saga.drain import Drain
from saga.errors import Unavailable
from saga.runner import STORE_PAUSE_SECS
from saga.store_outage import StoreOutage
from server.config import Config
from server.errors import CannotStart, refused_by_database
from store.errors import MigrationError, StoreInUse, StoreRefuses
from store.postgres import PostgresStore, open_postgres
from store.sqlite import SqliteStore, open_sqlite
from store.sqlite_connections import MEMORY

log = logging.getLogger("saga.server")

AnyStore = PostgresStore | SqliteStore


async def opened_store(stack: AsyncExitStack, config: Config, drain: Drain, outage: StoreOutage) -> AnyStore | None:
    """The store the configuration names. A database that is away is waited for; None: told to stop meanwhile."""
    events = config.kafka is not None
    host_unknown = False
    pause_secs, longest = STORE_PAUSE_SECS
    try:
        if config.database is None:
            return await _opened_embedded(stack, config, events)
        database = config.database
        while True:
            try:
                return await stack.enter_async_context(
                    open_postgres(
                        database.dsn(),
                        events=events,
                        max_connections=database.max_open_conns,
                        ready_connections=database.max_idle_conns,
                        idle_secs=database.conn_max_lifetime,
                    )
                )
            except StoreRefuses as error:
                raise refused_by_database(error) from error
            except Unavailable as error:
                # Waited for all the same: in many installations the name comes with the database.
                if isinstance(error.__cause__, socket.gaierror) and not host_unknown:
                    host_unknown = True
                    hint = "look at database.host, or DATABASE_URL; it is waited for"
                    log.error("database_host_unknown host=%s hint=%s", database.host, hint)
                outage.failed("start", f"{database.host}:{database.port}: {error}")
            with drain.ends_early() as pause:
                await trio.sleep(pause_secs)
            if pause.cancelled_caught:
                return None
            pause_secs = min(pause_secs * 2, longest)
    except (MigrationError, Unavailable) as error:
        raise CannotStart(str(error)) from error


async def _opened_embedded(stack: AsyncExitStack, config: Config, events: bool) -> SqliteStore:
    path: str | Path = MEMORY if config.saga.in_memory else config.saga.database_file
    try:
        store = await stack.enter_async_context(open_sqlite(path, events=events))
    except OSError as error:
        raise CannotStart(f"saga.data_dir: {error.filename or path}: {error.strerror or error}") from error
    except StoreInUse:
        raise
    except Unavailable as error:
        raise CannotStart(f"{path}: {error}") from error
    if not config.saga.in_memory:
        _warn_if_readable(config.saga.database_file)
    return store


def _warn_if_readable(file: Path) -> None:
    """Says that everybody on this machine can read the payloads: an earlier release made the file so, or a person."""
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file.parent, file)]
    if modes[0] & stat.S_IXOTH and modes[1] & stat.S_IROTH:
        hint = f"chmod -R o= {file.parent}"
        log.warning("database_file_readable path=%s mode=%s hint=%s", file, f"{modes[1]:04o}", hint)
