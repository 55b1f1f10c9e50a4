"""Listening for what other workers commit on PostgreSQL (`sql/postgres/008_notices.up.sql` says what they tell)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
import trio

from bridge import run_aio
from saga.errors import Unavailable
from saga.ports import Notice, NoticesMissed
from store.postgres_connections import CONNECT_SECS, Connection, Link, connect, fetch
from store.postgres_errors import translated
from store.queries import Dialect, load

HEARTBEAT_SECS = 30.0
"""How often the listening connection is tried: one that broke without a word would be silent for ever. The poll behind
the notices is what is prompt, so this need not be."""

LISTEN_PAUSE_SECS = (0.1, 5.0)
"""First and longest pause before listening is tried again."""

NOTICES = "saga_notices"
"""The channel. The triggers of the migration name it too."""

log = logging.getLogger("saga.store")

_Q = load(Dialect.POSTGRES)


class PostgresNotices:
    """Tells notices, but those of our own `writing_links`."""

    def __init__(self, dsn: str, writing_links: tuple[Link, ...]) -> None:
        self._dsn = dsn
        self._writing_links = writing_links

    async def listen(self, tell: Callable[[Notice], None]) -> None:
        """As `saga.ports.Store` says."""
        first, longest = LISTEN_PAUSE_SECS
        pause_secs = first
        listening = True  # that it never came to it is told as well

        def told(notice: Notice) -> None:
            nonlocal listening
            if isinstance(notice, NoticesMissed):
                listening = True
            tell(notice)

        while True:
            began = trio.current_time()
            try:
                await run_aio(self._listen_until_lost(told))
            except Unavailable as error:
                # Nothing depends on notices: the poll behind them finds the same, up to a second later.
                level, listening = (logging.INFO if listening else logging.DEBUG), False
                log.log(level, "notices_lost error=%s", error)
            if trio.current_time() - began > longest:
                pause_secs = first
            await trio.sleep(pause_secs)
            pause_secs = min(pause_secs * 2, longest)

    async def _listen_until_lost(self, tell: Callable[[Notice], None]) -> None:
        """Listens on a connection of its own; `Unavailable`: it was lost. Asyncio-flavoured."""
        lost = asyncio.Event()

        def on_notice(_connection: Connection, sender: int, _channel: str, payload: str) -> None:
            # What this process commits it knows; its own notices would make it look for what it has just taken.
            if any(link.server_pid == sender for link in self._writing_links):
                return
            try:
                notice = msgspec.json.decode(payload, type=Notice)
            except msgspec.DecodeError:
                log.warning("notice_unknown payload=%.200r", payload)  # a newer release beside us, or a stranger
            else:
                tell(notice)

        with translated():
            connection = await connect(self._dsn)
            try:
                connection.add_termination_listener(lambda _connection: lost.set())
                async with asyncio.timeout(CONNECT_SECS):
                    await connection.add_listener(NOTICES, on_notice)
                tell(NoticesMissed())
                while not lost.is_set():
                    try:
                        async with asyncio.timeout(HEARTBEAT_SECS):
                            await lost.wait()
                    except TimeoutError:
                        async with asyncio.timeout(CONNECT_SECS):
                            await fetch(connection, _Q["ping"])
            finally:
                connection.terminate()
        raise Unavailable("the listening connection was lost")
