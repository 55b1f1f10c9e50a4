"""Connections of the REST door that have not finished their TLS handshake: each for a bounded time, all of a bounded
number."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable

import trio
from hypercorn.config import Config

from saga.door_limits import DoorLimits, Places
from saga.manners import Turns

log = logging.getLogger("saga.web")

HANDSHAKE_SECS = 10.0
"""How long a client may take. A guess: a few round trips over the worst of lines."""

MOST_HANDSHAKES = 256
"""A guess: far more than a burst of honest clients has at a time, far fewer than the files a process may have open."""


class Handshakes:
    """Whoever comes when there are `MOST_HANDSHAKES` gets the place of the one that has been at it longest. An honest
    client is done within some round trips, so those that only hold places lose them to each other."""

    def __init__(self) -> None:
        self._under_way: dict[trio.CancelScope, None] = {}
        self._closed = False

    async def shake(self, stream: trio.SSLStream[trio.SocketStream]) -> bool:
        """Whether the connection can be used; if not, it is to be closed."""
        if self._closed:
            return False
        if len(self._under_way) >= MOST_HANDSHAKES:
            oldest = next(iter(self._under_way))
            del self._under_way[oldest]
            oldest.cancel()
        with trio.move_on_after(HANDSHAKE_SECS) as scope:
            self._under_way[scope] = None
            try:
                await stream.do_handshake()
                return True
            except trio.BrokenResourceError as error:
                log.info(
                    "tls_handshake_failed peer=%s error=%s", peer_of(stream.transport_stream), error.__cause__ or error
                )
                await _say_why(stream)
                return False
            finally:
                self._under_way.pop(scope, None)
        log.info("tls_handshake_failed peer=%s error=%s", peer_of(stream.transport_stream), "not finished in time")
        return False

    def cut(self) -> None:
        """Ends those under way: the server stops, and would wait for them."""
        self._closed = True
        for scope in self._under_way:
            scope.cancel()


def peer_of(stream: trio.SocketStream) -> str | None:
    """The address at the other end; None: it is gone already."""
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return None


async def _say_why(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Sends the alert that TLS has for the client, and that Trio leaves where it is."""
    alert = stream._outgoing.read()
    if alert:
        try:
            await stream.transport_stream.send_all(alert)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


class GuardedConfig(Config):
    """hypercorn's configuration, which is what a connection gets to see, with what ours need. `tls`: asked for the
    context of each new connection; None: cleartext. `places`: of the connections that are open."""

    tls: Callable[[], ssl.SSLContext] | None = None

    def __init__(self, max_connections: int = DoorLimits().max_connections) -> None:
        self.handshakes = Handshakes()
        self.places: Places[object] = Places(max_connections)
        self.turns = Turns()
