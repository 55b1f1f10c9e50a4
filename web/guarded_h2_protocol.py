"""Holds off defects of hypercorn 0.18 in how it speaks HTTP/2, and bounds what a client may cost (`saga.manners`).

The task that empties an HTTP/2 connection's buffers ends when the connection closes, and leaves the buffers as they
are; whoever is still answering on one of its streams then waits for it to be emptied, and the connection's nursery for
whoever waits. Here the buffers are closed too.

The preface of HTTP/2 looks like a request to the protocol before, which stops the clock of a new connection; the clock
goes on when a request has ended, and there may never be one. Here it goes on at once.

An answer waits for ever for a client that makes no room for it in its window, even if the client has reset the stream.
Here a reset ends the wait, and a client that does not take the next piece of an answer in `STALLED_SECS`, as over
HTTP/1, loses the stream.
"""

from __future__ import annotations

from typing import Any

import h2.events
import hypercorn.protocol
import trio
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.events import Body, EndBody
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import H2Protocol

from saga.door_limits import HEAD_SECS, STALLED_SECS
from saga.manners import TURN_SECS, BadManners, Manners, Turns
from web import guarded_tcp_server
from web.guarded_tcp_server import Preface, log
from web.handshakes import GuardedConfig


class GuardedH2Protocol(H2Protocol):
    """One HTTP/2 connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._manners = Manners(self.connection.incoming_buffer)
        self._turns = self.config.turns if isinstance(self.config, GuardedConfig) else Turns()
        self._is_known = False
        """A request on it was answered. What comes on it is taken at once, and not after what strangers send."""
        self._peer = self.client[0] if self.client else None
        self._head_has_come: trio.Event | None = None
        """While a head is under way."""

    async def initiate(self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None) -> None:
        await super().initiate(headers, settings)
        if headers is None:
            await self.send(Preface(idle=True))

    async def handle(self, event: Event) -> None:
        if isinstance(event, RawData):
            if not self._is_known:
                await self._turns.wait()
            turn_ends_at = trio.current_time() + TURN_SECS
            taken = 0
            while taken < len(event.data) and not self.closed:
                piece = event.data[taken : taken + self._manners.piece_bytes]
                taken += len(piece)
                await super().handle(RawData(piece))
                self._watch_head()
                if trio.current_time() >= turn_ends_at:
                    await self._turns.wait()
                    turn_ends_at = trio.current_time() + TURN_SECS
            return
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()
            self._manners.forget()
            self._watch_head()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        try:
            self._manners.judge(events)
        except BadManners as error:
            await self._end(str(error))
            return
        for event in events:
            if isinstance(event, h2.events.StreamReset) and event.stream_id in self.stream_buffers:
                await self.stream_buffers[event.stream_id].close()
        await super()._handle_events(events)

    async def _end(self, reason: str) -> None:
        log.info("http_connection_ended peer=%s reason=%s", self._peer, reason)
        self.connection.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
        await self._flush()
        await self.send(Closed())

    def _watch_head(self) -> None:
        if self._manners.head_is_under_way and not self.closed:
            if self._head_has_come is None:
                self._head_has_come = trio.Event()
                self.task_group.spawn(self._await_head, self._head_has_come)
        elif self._head_has_come is not None:
            self._head_has_come.set()
            self._head_has_come = None

    async def _await_head(self, has_come: trio.Event) -> None:
        with trio.move_on_after(HEAD_SECS) as scope:
            await has_come.wait()
        if scope.cancelled_caught and not self.closed:
            await self._end("the head of a request did not come in time")

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Body):
            # In pieces, so that a long answer to a slow client is not cut off while it is being taken.
            for start in range(0, len(event.data), guarded_tcp_server.PIECE_BYTES):
                piece = event.data[start : start + guarded_tcp_server.PIECE_BYTES]
                if not await self._taken(Body(stream_id=event.stream_id, data=piece)):
                    return
        elif isinstance(event, EndBody):
            if await self._taken(event):
                self._is_known = True
        else:
            await super().stream_send(event)

    async def _taken(self, event: Body | EndBody) -> bool:
        """Whether the client has taken it; if not, its stream is reset."""
        with trio.move_on_after(STALLED_SECS) as scope:
            await super().stream_send(event)
        if not scope.cancelled_caught:
            return True
        log.info("http_client_stalled peer=%s", self._peer)
        buffer = self.stream_buffers.get(event.stream_id)
        if buffer is not None:
            await buffer.close()
        try:
            self.connection.reset_stream(event.stream_id, ErrorCodes.CANCEL)
        except ProtocolError:
            return False  # it has ended otherwise meanwhile
        # What empties the buffers finds it closed, and forgets it.
        await self._window_updated(event.stream_id)
        await self._flush()
        return False


def install() -> None:
    """hypercorn looks the class up in its module for each connection, and offers no other way to set it."""
    setattr(hypercorn.protocol, "H2Protocol", GuardedH2Protocol)  # noqa: B010  # not exported, so no plain assignment
