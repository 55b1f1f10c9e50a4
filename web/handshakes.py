"""TLS in front of the REST door: the handshake of each new connection, within bounds of time and number."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable

import trio
from hypercorn.config import Config

from saga.door_limits import HANDSHAKE_SECS, MOST_HANDSHAKES, DoorLimits, Places
from saga.manners import Turns

log = logging.getLogger("saga.web")


class Handshakes:
    """The handshakes under way at one port."""

    def __init__(self) -> None:
        self._places: Places[trio.CancelScope] = Places(MOST_HANDSHAKES)

    async def shake(self, stream: trio.SSLStream[trio.SocketStream], peer: str | None) -> bool:
        """Whether the connection can be used; if not, it is to be closed. `peer`: its address, for the log."""
        with trio.move_on_after(HANDSHAKE_SECS) as scope:
            if not self._places.take(scope, scope.cancel):
                return False
            try:
                await stream.do_handshake()
                return True
            except trio.BrokenResourceError as error:
                log.info("tls_handshake_failed peer=%s error=%s", peer, error.__cause__ or error)
                await _say_why(stream)
                return False
            finally:
                self._places.leave(scope)
        log.info("tls_handshake_failed peer=%s error=%s", peer, "not finished in time")
        return False

    def cut(self) -> None:
        """Ends those under way, and begins no others: the server stops, and would wait for them."""
        self._places.shut()


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
