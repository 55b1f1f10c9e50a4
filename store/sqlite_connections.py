"""Connections to the embedded database: how each is set up, who may have the file, and errors in the port's words."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saga.errors import Unavailable
from store.errors import StoreInUse
from store.instants import SystemClock, to_text

MEMORY = ":memory:"
OLDEST_SQLITE = (3, 37, 0)
"""STRICT tables; RETURNING (3.35) is older."""

BUSY_TIMEOUT_MS = 5000
"""How long a connection waits for another's lock. Only the CLI's status and backups can hold one; a guess."""


@contextmanager
def opened_connection(path: str | Path) -> Iterator[sqlite3.Connection]:
    """A connection set up as this store needs it, closed at the end. `Unavailable`: SQLite is too old."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise Unavailable(f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed")
    # Threads take turns (limiters in `SqliteStore`), so the driver's own check would only be in the way.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        connection.row_factory = sqlite3.Row
        connection.create_function("clock_timestamp", 0, lambda: to_text(SystemClock().now()))
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        yield connection
    finally:
        connection.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file beside the database that says it is in use; the system lets go of it however the process ends.
    Folder and database are made, if they are not there, for this user alone; what is there keeps its modes.

    `StoreInUse`: another process holds it.
    """
    for folder in (*reversed(path.parent.parents), path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    lock_path = path.with_name(path.name + ".lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreInUse(f"{path} is in use by another process (it holds {lock_path})") from error
        with suppress(FileExistsError):
            # SQLite would make it as the umask says, and gives its -wal and -shm the mode that it has.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        yield
    finally:
        # The file stays: taking it away would let two processes hold locks on two files of one name.
        os.close(descriptor)


@contextmanager
def translated_sqlite() -> Iterator[None]:
    """What SQLite says of the database (locked, full, unreadable) becomes `Unavailable`; what it says of content is
    handled where the row is known; a mistake in our own use of it stays what it is."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        raise Unavailable("the embedded database does not answer", error) from error
