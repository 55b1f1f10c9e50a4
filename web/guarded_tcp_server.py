"""Holds off two defects of hypercorn 0.18 under Trio, both in how it treats one connection.

One bad HTTP/2 request ends the whole process: some inputs (data on a stream that was answered already, a path that is
not ASCII) raise inside the connection's handler, and the error leaves `serve` and its nursery. Here it ends the one
connection it came from.

A client that stops reading holds up the stop for ever: bytes are sent under a shield without a deadline. Here a client
that takes nothing for `STALLED_SECS` is cut off.
"""

from __future__ import annotations

import logging
from typing import cast

import hypercorn.trio.run
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer

from web.handshakes import GuardedConfig

log = logging.getLogger("saga.web")

STALLED_SECS = 10.0
"""How long a client may take for one piece of an answer. A guess: far above a round trip, below any shutdown grace."""
PIECE_BYTES = 64 * 1024


class GuardedTCPServer(TCPServer):
    """One connection; an error of its protocol is logged and closes it."""

    async def run(self) -> None:
        try:
            if isinstance(self.config, GuardedConfig) and self.config.tls is not None:
                # hypercorn's own way to TLS has one context for as long as it serves.
                plain = cast(trio.SocketStream, self.stream)
                self.stream = trio.SSLStream(plain, self.config.tls(), server_side=True, https_compatible=True)
                if not await self.config.handshakes.shake(self.stream):
                    return
            await super().run()
        except Exception as error:
            log.warning("http_connection_failed error=%r", _first(error))
            log.debug("http_connection_failed", exc_info=error)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self.stream)
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if cancelled is None:
                raise
            # The server stops; what failed beside that is not worth more than a line.
            if rest is not None:
                log.warning("http_connection_failed error=%r", _first(rest))
            raise cancelled from None

    async def protocol_send(self, event: Event) -> None:
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                for start in range(0, len(event.data), PIECE_BYTES):
                    # Shielded as hypercorn does it: half a frame would make the rest of the connection nonsense.
                    with trio.move_on_after(STALLED_SECS, shield=True) as scope:
                        await self.stream.send_all(event.data[start : start + PIECE_BYTES])
                    if scope.cancelled_caught:
                        log.info("http_client_stalled")
                        await trio.aclose_forcefully(self.stream)
                        raise trio.BrokenResourceError
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                await self.protocol.handle(Closed())


def install() -> None:
    """hypercorn looks the class up in its module each time it serves, and offers no other way to set it."""
    setattr(hypercorn.trio.run, "TCPServer", GuardedTCPServer)  # noqa: B010  # not exported, so no plain assignment


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
