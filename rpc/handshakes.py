"""TLS in front of the gRPC door: the handshake of each new connection, with the context of its time, within bounds of
time and number.

`loop.create_server(ssl=...)` has one context for as long as it listens and any number of handshakes; so the listener
takes plain connections, and each is made a TLS one here. Asyncio-flavoured.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from contextvars import ContextVar
from typing import cast

from bridge import running_loop
from saga.door_limits import HANDSHAKE_SECS, MOST_HANDSHAKES, Places
from saga.peers import peer_of

log = logging.getLogger("saga.rpc.server")

GOODBYE_SECS = 2.0
"""How long a connection that we close waits for the peer's half of TLS's goodbye. A guess."""

Context = Callable[[], ssl.SSLContext]


class Handshakes:
    """The handshakes under way at one port."""

    def __init__(self, context: Context) -> None:
        """`context` is asked for each new connection."""
        self._context = context
        self._places: Places[asyncio.Transport] = Places(MOST_HANDSHAKES)

    def before(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        """A protocol for a plain connection; when it has shaken hands, the connection is that of a protocol that is
        made then."""
        return _Arrival(self, make)

    def begin(self, transport: asyncio.Transport, make: Callable[[], asyncio.Protocol]) -> None:
        """A connection has come."""
        task = running_loop().create_task(self._shake(transport, make, peer_of(transport.get_extra_info("socket"))))

        def end() -> None:
            task.cancel()
            transport.abort()  # which the task does not, if it has not begun

        if not self._places.take(transport, end):
            end()

    async def _shake(
        self, transport: asyncio.Transport, make: Callable[[], asyncio.Protocol], peer: str | None
    ) -> None:
        held = _Held()
        _ARRIVED.set(transport)
        try:
            context = self._context()
            context.sslobject_class = _TellsWhy
            encrypted = await running_loop().start_tls(
                transport,
                held,
                context,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECS,
                ssl_shutdown_timeout=GOODBYE_SECS,
            )
        except OSError as error:  # TLS's own, those of the connection, and its time being up
            log.info("tls_handshake_failed peer=%s error=%s", peer, error)
            transport.abort()
        except BaseException:
            transport.abort()
            raise
        else:
            held.hand_over(cast(asyncio.Transport, encrypted), make())
        finally:
            self._places.leave(transport)

    def cut(self) -> None:
        """Ends those under way, and begins no others: the server stops."""
        self._places.shut()


_ARRIVED: ContextVar[asyncio.Transport] = ContextVar("_ARRIVED")
"""The plain connection, in the task of its handshake and in what that has the loop call."""


class _TellsWhy(ssl.SSLObject):
    """Sends the alert that TLS has for a client whose handshake fails. asyncio cuts the connection with the alert still
    in its hands."""

    _transport: asyncio.Transport | None = None

    def do_handshake(self) -> None:
        # The first turn is the task's; those after it are of what arrives.
        self._transport = self._transport or _ARRIVED.get()
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            self._transport.write(self._transport.get_protocol()._outgoing.read())  # type: ignore[attr-defined]  # asyncio's own
            raise


def let_go(transport: asyncio.Transport) -> None:
    """Gives back the quarter of a megabyte that asyncio reads TLS into, at the end of a connection: the rest of that,
    which refers to itself, waits for the garbage to be collected."""
    tls = getattr(transport, "_ssl_protocol", None)
    if tls is not None:
        tls._ssl_buffer = bytearray()
        tls._ssl_buffer_view = memoryview(tls._ssl_buffer)


class _Arrival(asyncio.Protocol):
    """The protocol of a plain connection until its handshake begins, which it does at once."""

    def __init__(self, handshakes: Handshakes, make: Callable[[], asyncio.Protocol]) -> None:
        self._handshakes = handshakes
        self._make = make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        plain = cast(asyncio.Transport, transport)
        plain.pause_reading()  # what comes before the handshake has begun would be lost here
        self._handshakes.begin(plain, self._make)


class _Held(asyncio.Protocol):
    """Keeps what comes between the end of the handshake and the turn of the task that waits for it."""

    def __init__(self) -> None:
        self._received: list[bytes] = []
        self._ended = False

    def data_received(self, data: bytes) -> None:
        self._received.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True

    def hand_over(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """The connection is `protocol`'s from here on."""
        if self._ended:
            return
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        for data in self._received:
            protocol.data_received(data)
