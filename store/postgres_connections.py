"""The connections of the store on PostgreSQL: how each is set up, how long anything on one may take, and what an
exchange over one promises. What is said over them is not here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from typing import Any, TypeVar

import asyncpg
import trio

from bridge import run_aio
from saga.errors import Unavailable
from store.postgres_errors import NothingSent, TryAgain, takes_no_writes, translated
from store.queries import Query
from store.write_health import WriteHealth

T = TypeVar("T")

EXCHANGE_SECS = 30.0
"""How long one exchange may take, the server's own work included, before it counts as lost. Far above any batch."""

IDLE_SECS = 5.0
"""How long the server waits for the next statement of a transaction. A process that stands still, or a machine that is
gone without a word, would keep what it has locked from all others for as long as its connection lasts: hours."""

LOCK_SECS = 2.0
"""How long a statement waits for a row that another transaction has changed and not committed. Ours need milliseconds;
a person's may stay open for hours, and others wait behind the statement, a lease among them. Above Postgres's
`deadlock_timeout`, so that of two transactions in a knot one gives way."""

CONNECT_SECS = 5.0
"""How long opening a connection may take. A database that needs longer is not one to wait for with sagas in hand."""

GIVEN_WAY = 5
"""How often a transaction that had to give way to another is tried again. Rivals are few; a guess."""

Connection = Any
"""asyncpg.Connection or a pool's proxy of it; the library has no types."""

SESSION = {
    "application_name": "saga",
    "jit": "off",  # no statement here runs long enough to repay compiling it
    "statement_timeout": str(int(EXCHANGE_SECS * 1000)),  # the server gives up when we do
    "idle_in_transaction_session_timeout": str(int(IDLE_SECS * 1000)),
    "lock_timeout": str(int(LOCK_SECS * 1000)),
}
# Rewriting a table of millions takes its time, and what was cut off would be begun anew for ever. Another that migrates
# is waited for no longer than for any exchange, so that a server that waits says so and can be stopped.
MIGRATION_SESSION = {**SESSION, "statement_timeout": "0", "lock_timeout": str(int(EXCHANGE_SECS * 1000))}
# A batch's statement is planned once a connection. Without seqscan because that plan must also suit a table that was
# empty when it was made and is not any more.
WRITER_SESSION = {**SESSION, "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off"}
# Optional filters and limits are only planned well with their values at hand.
READER_SESSION = {**SESSION, "plan_cache_mode": "force_custom_plan"}


async def fetch(connection: Connection, query: Query, **parameters: object) -> list[Any]:
    """Runs a query with all its parameters, named. asyncpg prepares each text once a connection."""
    assert parameters.keys() == set(query.parameters), query.name  # every method has a case in tests/store
    found: list[Any] = await connection.fetch(query.text, *(parameters[name] for name in query.parameters))
    return found


class Link:
    """One long-lived connection, opened when it is needed and opened anew after it was lost; one exchange at a time.
    Asyncio-flavoured but for `write` and `write_or_give_up`."""

    def __init__(self, dsn: str, session: dict[str, str]) -> None:
        self._dsn = dsn
        self._session = session
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()
        self.health = WriteHealth(takes_no_writes)

    async def write(self, say: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Runs a write to its end: a cancel comes before it or waits for its outcome, which is bounded in time. (A
        claim that was cut off would own sagas nobody knows of, and a transaction that was costs the connection.)"""
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            answer = await run_aio(self.exchange(say))
        return answer  # noqa: RET504  a scope may swallow, in mypy's eyes: a return inside it would not count

    async def write_or_give_up(self, say: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Runs a write that a cancel cuts off, with the connection if it was begun: whether it happened is then
        unknown. For writes whose caller has no time to wait for a database that hangs."""
        return await run_aio(self.exchange(say))

    async def exchange(self, say: Callable[[Connection], Awaitable[T]]) -> T:
        """What `say` got from the server, in time. Errors come translated; after `Unavailable` the connection is given
        up, since nobody knows what state it is in. A transaction that had to give way is tried again."""
        with self.health.watched():
            return await self._exchange(say)

    async def _exchange(self, say: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._turn:
            for tried in range(GIVEN_WAY):
                try:
                    with translated():
                        connection = await self._opened()
                        async with asyncio.timeout(EXCHANGE_SECS):
                            return await say(connection)
                except TryAgain:
                    # Unequal pauses, or the two would meet again.
                    await asyncio.sleep(random.random() * 0.01 * 2**tried)
                except BaseException as error:
                    if not _leaves_connection_usable(error):
                        self.drop()
                    raise
            raise Unavailable("the database made the transaction give way again and again")

    async def _opened(self) -> Connection:
        if self._connection is None or self._connection.is_closed():
            try:
                with translated():
                    self._connection = await connect(self._dsn, self._session)
            except Unavailable as error:
                raise NothingSent(error.told, error.reason) from error
        return self._connection

    def drop(self) -> None:
        """Cuts the connection, if there is one, without a word to the server."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    @property
    def server_pid(self) -> int | None:
        """The server process at the other end, which signs the notices of what is written here."""
        return None if self._connection is None else self._connection.get_server_pid()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close(timeout=CONNECT_SECS)
            self._connection = None


def _leaves_connection_usable(error: BaseException) -> bool:
    """A refused statement does; a lost, late or cancelled one may still be running."""
    return isinstance(error, Exception) and not isinstance(error, Unavailable)


class Readers:
    """A small pool of connections for reads. Made by `open_readers`."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    async def read(self, say: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """What `say` got from the server, in time and with errors translated; a cancel cuts it off."""

        async def body() -> T:
            async with asyncio.timeout(EXCHANGE_SECS):
                connection = await self._pool.acquire()
                try:
                    return await say(connection)
                except asyncio.CancelledError:
                    # Its release would first wait for the server to give the query up, and a server may hang.
                    connection.terminate()
                    raise
                finally:
                    await self._pool.release(connection)

        with translated():
            return await run_aio(body())

    async def close(self) -> None:
        """Says good-bye to the server. Asyncio-flavoured."""
        await self._pool.close()

    def drop(self) -> None:
        """Cuts the connections there are, without a word to the server."""
        self._pool.terminate()


async def open_readers(dsn: str, *, most: int, ready: int, idle_secs: float) -> Readers:
    """Readers of which `ready` are opened now; one that was idle for `idle_secs` (0: for ever) is closed.
    Asyncio-flavoured; errors are the driver's."""
    pool = await asyncpg.create_pool(
        dsn,
        min_size=ready,
        max_size=most,
        max_inactive_connection_lifetime=idle_secs,
        timeout=CONNECT_SECS,
        server_settings=READER_SESSION,
        max_cached_statement_lifetime=0,
        reset=_keep_session,
    )
    return Readers(pool)


async def _keep_session(_connection: Connection) -> None:
    """In place of asyncpg's reset after each use, a round trip of its own: reads leave nothing behind to reset."""


async def connect(dsn: str, session: dict[str, str] | None = None) -> Connection:
    """A connection set up as this store needs it. Asyncio-flavoured; errors are the driver's."""
    return await asyncpg.connect(
        dsn,
        timeout=CONNECT_SECS,
        server_settings=SESSION if session is None else session,
        max_cached_statement_lifetime=0,  # the few statements there are stay prepared as long as the connection
    )


def instant(stored: datetime | None) -> datetime | None:
    """asyncpg gives instants as such."""
    return stored
