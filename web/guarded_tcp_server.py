"""Holds off defects of hypercorn 0.18 under Trio, both in how it treats one connection.

One bad HTTP/2 request ends the whole process: some inputs (data on a stream that was answered already, a path that is
not ASCII) raise inside the connection's handler, and the error leaves `serve` and its nursery. Here it ends the one
connection it came from.

Two more things it leaves open: how many connections there are, and how long one may take for its first request. Here
the first is `saga.door_limits.Places`, the second `HEAD_SECS`.

A client that stops reading holds up the stop for ever: bytes are sent under a shield without a deadline. Here a client
that takes nothing for `STALLED_SECS` is cut off.
"""

from __future__ import annotations

import logging
from typing import cast

import hypercorn.trio.run
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer

from saga.door_limits import HEAD_SECS, STALLED_SECS
from saga.peers import peer_of, watch_for_silence
from web.handshakes import GuardedConfig

log = logging.getLogger("saga.web")

PIECE_BYTES = 64 * 1024
"""How much of an answer a client is to take within `STALLED_SECS`."""


class Preface(Updated):
    """The client will speak HTTP/2, and has asked for nothing yet."""


class GuardedTCPServer(TCPServer):
    """One connection; an error of its protocol is logged and closes it."""

    _asked = False
    """A request has come on it."""
    _is_over = False
    """Nothing more comes on it."""
    _peer: str | None = None
    """The address at the other end."""

    async def run(self) -> None:
        self._peer = peer_of(cast(trio.SocketStream, self.stream).socket)
        if not isinstance(self.config, GuardedConfig):
            await self._run()
            return
        places = self.config.places
        with trio.CancelScope() as scope:
            if not places.take(self, scope.cancel):
                log.info("http_connection_refused peer=%s reason=%s", self._peer, "too many connections")
                await trio.aclose_forcefully(self.stream)
                return
            try:
                await self._run()
            finally:
                places.leave(self)
                self._let_go()

    def _let_go(self) -> None:
        """The buffers of TLS go with the connection: Trio's stream refers to itself, and they would wait for the
        garbage to be collected."""
        stream: object = self.stream
        if isinstance(stream, trio.SSLStream):
            del stream._handshook
        del self.stream

    async def _run(self) -> None:
        watch_for_silence(cast(trio.SocketStream, self.stream).socket)
        try:
            if isinstance(self.config, GuardedConfig) and self.config.tls is not None:
                # hypercorn's own way to TLS has one context for as long as it serves.
                plain = cast(trio.SocketStream, self.stream)
                self.stream = trio.SSLStream(plain, self.config.tls(), server_side=True, https_compatible=True)
                if not await self.config.handshakes.shake(self.stream, self._peer):
                    return
            await super().run()
        except Exception as error:
            log.warning("http_connection_failed peer=%s error=%r", self._peer, _first(error))
            log.debug("http_connection_failed peer=%s", self._peer, exc_info=error)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self.stream)
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if cancelled is None:
                raise
            # The server stops; what failed beside that is not worth more than a line.
            if rest is not None:
                log.warning("http_connection_failed peer=%s error=%r", self._peer, _first(rest))
            raise cancelled from None

    async def _read_data(self) -> None:
        await super()._read_data()
        # hypercorn lets the clock of an idle connection run on when its client has left, and waits for it.
        self._is_over = True
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        if not self._asked:
            with trio.move_on_after(HEAD_SECS) as scope:
                await self.context.terminated.wait()
            if scope.cancelled_caught:
                log.info("http_head_timeout peer=%s", self._peer)
            with trio.CancelScope(shield=True):
                await self._initiate_server_close()
            return
        await super()._idle_timeout()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated) and self._is_over:
            return
        if isinstance(event, Updated) and isinstance(self.config, GuardedConfig):
            if event.idle:
                self.config.places.idle(self)
                if isinstance(event, Preface):
                    self._asked = False
            else:
                self._asked = True
                self.config.places.busy(self)
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
                        log.info("http_client_stalled peer=%s", self._peer)
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
