"""What Postgres and its driver say, in this product's words: one table, the most specific first.

the content of one row       -> RowRejected     (classes 22, 23, 54; the driver's own refusal of a value)
two transactions in a knot   -> TryAgain        (class 40; inside the store only)
it will not have us          -> StoreRefuses    (credentials, rights, no such database, certificates, no TLS, a bad DSN)
the environment              -> Unavailable     (connections, resources, operators, time-outs)
anything else                -> not translated: our own bug, raised as it is
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from saga.errors import RowRejected, SagaError, Unavailable
from store.errors import StoreRefuses


class TryAgain(SagaError):
    """The transaction was chosen to give way to another; nothing was changed. Never leaves the store."""


class NothingSent(Unavailable):
    """No connection could be opened, so nothing can have happened either."""


_REFUSING_CLASSES = frozenset({"28", "3D"})
"""SQLSTATE classes: authorization, no such database."""

_NO_RIGHT = "42501"

_ENVIRONMENT_CLASSES = frozenset({"08", "53", "55", "57", "58"})
"""SQLSTATE classes: connection, resources, object state (a lock not to be had), operator, system."""

_ENVIRONMENT_STATES = frozenset({"25006", "25P03", "F0000", "XX001", "XX002"})
"""Read-only after a failover; a transaction that stood still; a bad configuration file; damaged data or index."""

_CONTENT_CLASSES = frozenset({"22", "23", "54"})
"""Data, constraints, limits (nesting, size of an index entry)."""

_HAS_NO_TLS = "rejected SSL upgrade"
"""What the driver says of a server that has none although the mode asks for it, by no class and no code of its own.
`test_each_mode_insists_on_tls_with_a_server_that_has_none_or_does_without`."""


def translation_of(error: BaseException) -> type[SagaError] | None:
    """What an error means to the port; None: it is not of the database's or the network's making."""
    if isinstance(error, asyncpg.InvalidCachedStatementError | asyncpg.OutdatedSchemaCacheError):
        return Unavailable  # the schema was migrated under a running process; the next try plans anew
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        if state[:2] in _CONTENT_CLASSES:
            return RowRejected
        if state[:2] == "40":
            return TryAgain
        if state[:2] in _REFUSING_CLASSES or state == _NO_RIGHT:
            return StoreRefuses
        if state[:2] in _ENVIRONMENT_CLASSES or state in _ENVIRONMENT_STATES:
            return Unavailable
        return None
    if isinstance(error, asyncpg.InterfaceError):
        # The driver's DataError is a ValueError: a value it cannot send. Its other refusals are about the connection.
        # A bad DSN is a ValueError too, but no row's fault.
        if isinstance(error, asyncpg.ClientConfigurationError):
            return StoreRefuses
        return RowRejected if isinstance(error, ValueError) else Unavailable
    if isinstance(error, ssl.SSLCertVerificationError):
        return StoreRefuses
    if isinstance(error, ConnectionError) and _HAS_NO_TLS in str(error):
        return StoreRefuses
    if isinstance(error, asyncpg.InternalClientError | OSError | TimeoutError | EOFError):
        return Unavailable  # OSError: refused, reset, no such name, TLS; EOFError: cut off in the middle of an answer
    return None


def takes_no_writes(error: Unavailable) -> bool:
    """The server was there and would not write: no room, no memory, a failing disk, or read-only after a failover. (A
    connection that was lost proves nothing about the next.)"""
    cause = error.__cause__
    state = (cause.sqlstate or "") if isinstance(cause, asyncpg.PostgresError) else ""
    return state[:2] in {"53", "58"} or state == "25006"


@contextmanager
def translated() -> Iterator[None]:
    """Raises the port's error for the database's, with the cause kept."""
    try:
        yield
    except SagaError:
        raise
    except Exception as error:
        meaning = translation_of(error)
        if meaning is None:
            raise
        text = str(error) or type(error).__name__
        if meaning is RowRejected:
            raise RowRejected(f"the database refuses the content: {text}") from error
        if meaning is TryAgain:
            raise TryAgain(text) from error
        if meaning is StoreRefuses:
            raise StoreRefuses("the database refuses this server", text) from error
        raise Unavailable("the database cannot be reached", text) from error
