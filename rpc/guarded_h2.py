"""One HTTP/2 connection of the gRPC door: what a client sends ends its own connection or stream at most, and says so in
one line of the log; and what it does not send, or does not take, ends its connection in time.

grpclib 0.4.9 lets errors of its parser, and events it has no row for, out of `data_received`, where they are nobody's;
and a request without its method or path is an error in its own code. It answers pings and settings into a buffer
without bounds, has no clock for a connection without calls, nor for a client that takes no bytes, and lets nobody else
have a turn while it goes through whatever one client has sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import trio
from grpclib.config import Configuration
from grpclib.protocol import Connection, EventsProcessor, H2Protocol
from h2.config import H2Configuration
from h2.errors import ErrorCodes
from h2.events import Event, RequestReceived, StreamReset
from h2.exceptions import ProtocolError

from bridge import running_loop
from rpc.handshakes import let_go
from saga.door_limits import HEAD_SECS, STALLED_SECS, Places
from saga.manners import LEAST_PIECE_BYTES, TURN_SECS, BadManners, Manners
from saga.peers import peer_of, watch_for_silence

log = logging.getLogger("saga.rpc.server")

IDLE_SECS = 300.0
"""How long a connection stays open between calls; then it is sent GOAWAY, upon which clients open another when they
need one. A guess: clients of gRPC keep one for their lifetime, and look for a call of theirs if it ends too often."""

UNSENT_BYTES = 4 * 1024 * 1024
"""What may wait to be taken by a client: a frame for each stream it may have, and much more of the answers to pings."""

FRAME_BYTES = 16 * 1024
"""The longest frame of an answer, however long a client lets them be: gRPC's own clients, when they measure how fast a
connection is, let them be of megabytes, and one frame is given to the transport as a whole."""

CALLS_AT_ONCE = 8
"""How many calls of one connection begin before others have their turn. Each takes some 0.3 ms: a client that asks a
hundred things in one go is to cost whoever comes after it no more than a few of them."""

NEEDED = frozenset({":method", ":path"})
"""Headers a call cannot be told without."""


class Turns:
    """As `saga.manners.Turns`, for callbacks: in each round of the loop one connection takes what it has sent, and one
    more of which nothing was taken yet, so that whoever comes waits for those who came, and for no flood."""

    def __init__(self) -> None:
        self._first: deque[Callable[[], None]] = deque()
        self._later: deque[Callable[[], None]] = deque()
        self._are_given = False

    def ask(self, take: Callable[[], None], *, first: bool) -> None:
        """`take` is called once. `first`: nothing was taken from that connection before."""
        (self._first if first else self._later).append(take)
        if not self._are_given:
            self._are_given = True
            running_loop().call_soon(self._give)

    def _give(self) -> None:
        for waiting in (self._first, self._later):
            if waiting:
                running_loop().call_soon(waiting.popleft())
        self._are_given = bool(self._first or self._later)
        if self._are_given:
            running_loop().call_soon(self._give)


class _Events(EventsProcessor):
    """What the pieces of one connection held; `left`: and was not processed yet."""

    def __init__(self, handler: Any, connection: Connection) -> None:
        super().__init__(handler, connection)
        self.left: deque[Event] = deque()

    def take(self, events: Sequence[Event]) -> None:
        """A call that is reset in the same piece never begins: its task would cost most of it, for nothing."""
        reset = {event.stream_id for event in events if isinstance(event, StreamReset)}
        self.left = deque(
            event for event in events if not (reset and isinstance(event, RequestReceived) and event.stream_id in reset)
        )

    def process_some(self) -> None:
        """What is left, up to the call that would be one more than may begin at a time."""
        begun, left = 0, self.left
        while left:
            begun += isinstance(left[0], RequestReceived)
            if begun > CALLS_AT_ONCE:
                break
            self.process(left.popleft())

    def process(self, event: Event) -> None:
        # HTTP/2 says of what is not known: ignore it. grpclib raises.
        if event.__class__ in getattr(self, "processors", ()):
            super().process(event)


class GuardedH2Protocol(H2Protocol):
    """As grpclib's. A connection that has failed takes nothing more. `places`, `turns`: of all the connections that are
    open."""

    processor: _Events

    def __init__(
        self, handler: Any, config: Configuration, h2_config: H2Configuration, places: Places[object], turns: Turns
    ) -> None:
        super().__init__(handler, config, h2_config)
        self._places = places
        self._turns = turns
        self._clock: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._head: asyncio.TimerHandle | None = None
        self._to_take = bytearray()
        self._is_waiting = False
        """For its turn, in which more of it is taken."""
        self._had_turn = False
        self._is_known = False
        """A call on it was answered. Little that comes on it is taken at once, and not after what strangers send."""
        self._transport: asyncio.Transport | None = None
        self._peer: str | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.processor = _Events(self.handler, self.connection)
        self.manners = Manners(self.connection._connection.incoming_buffer)
        self._transport = transport
        self._peer = peer_of(transport.get_extra_info("socket"))
        if not self._places.take(self, self.end):
            log.info("grpc_connection_refused peer=%s reason=%s", self._peer, "too many connections")
            self.end()
            return
        watch_for_silence(transport.get_extra_info("socket"))
        self._clock = running_loop().call_later(HEAD_SECS, self.end)

    def data_received(self, data: bytes) -> None:
        self._to_take += data
        if not self._is_waiting:
            if self._is_known and len(data) <= LEAST_PIECE_BYTES:
                self._take_some()
            self._go_on()

    @property
    def _has_left(self) -> bool:
        return bool(self.processor.left or self._to_take)

    def _turn(self) -> None:
        """Takes what has come, piece by piece, for as long as a turn lasts, or until one held much: the calls that it
        began are to have their time first."""
        self._is_waiting, self._had_turn = False, True
        ends_at = trio.current_time() + TURN_SECS
        while self._has_left:
            self._take_some()
            if self.manners.had_much or trio.current_time() >= ends_at:
                break
        self._go_on()

    def _go_on(self) -> None:
        """What is left is taken when others have had their turns, and more is not read until then."""
        transport = self._transport
        if transport is None:
            return
        if self._has_left:
            self._is_waiting = True
            transport.pause_reading()
            self._turns.ask(self._turn, first=not self._had_turn)
        elif not transport.is_reading():
            # Also when it closes: asyncio's TLS does not end for a peer that has ended while nothing was read.
            transport.resume_reading()

    def _take_some(self) -> None:
        """What is left of the piece before; of the next one, if nothing is."""
        if self.connection.is_closing():
            self._drop()
            return
        try:
            if not self.processor.left:
                self._take_piece()
            self.processor.process_some()
            self._flush()
        except ProtocolError:
            self._flush()  # GOAWAY, which says why
            self.processor.close("protocol error")
        except BadManners as error:
            log.info("grpc_connection_ended peer=%s reason=%s", self._peer, error)
            self.end(ErrorCodes.ENHANCE_YOUR_CALM)
        except Exception as error:  # noqa: BLE001  (whatever a client can provoke in the parser)
            log.warning("grpc_connection_failed peer=%s error=%r", self._peer, error)
            self.processor.close("unreadable HTTP/2")
        assert self._transport is not None
        if self._transport.get_write_buffer_size() > UNSENT_BYTES:
            self._cut("unread answers")
        self._watch_head()

    def _take_piece(self) -> None:
        size = self.manners.piece_bytes
        piece = bytes(self._to_take[:size])
        del self._to_take[:size]
        events = self.connection.feed(piece)
        self.manners.judge(events)
        self._keep_frames_short()
        self.connection.flush()
        self.processor.take(events)

    def _keep_frames_short(self) -> None:
        h2 = self.connection._connection
        if h2.max_outbound_frame_size > FRAME_BYTES:
            h2.max_outbound_frame_size = FRAME_BYTES
            for stream in h2.streams.values():
                stream.max_outbound_frame_size = FRAME_BYTES

    def _drop(self) -> None:
        self._to_take.clear()
        self.processor.left.clear()

    def _flush(self) -> None:
        if not self.connection.is_closing():
            self.connection.flush()

    def _watch_head(self) -> None:
        if self.manners.head_is_under_way and not self.connection.is_closing():
            if self._head is None:
                self._head = running_loop().call_later(HEAD_SECS, self.end)
        elif self._head is not None:
            self._head.cancel()
            self._head = None

    def note_calls(self, any_call: bool, *, is_busy: bool) -> None:
        """Whether a call is under way, and whether one is that keeps its connection its place."""
        (self._places.busy if is_busy else self._places.idle)(self)
        self._is_known = self._is_known or not any_call
        if any_call and self._clock is not None:
            self._clock.cancel()
            self._clock = None
        elif not any_call and self._clock is None and not self.connection.is_closing():
            self._clock = running_loop().call_later(IDLE_SECS, self.end)

    def end(self, reason: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Ends the connection: GOAWAY, and what is still to be sent."""
        if not self.connection.is_closing():
            self.connection._connection.close_connection(reason)
            self.connection.flush()
            self.processor.close("the connection was idle")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = running_loop().call_later(STALLED_SECS, self._cut, "stalled")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _cut(self, reason: str) -> None:
        log.info("grpc_client_stalled peer=%s reason=%s", self._peer, reason)
        self.processor.close(reason)
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._places.leave(self)
        self._drop()
        self.manners.forget()
        if self._transport is not None:
            let_go(self._transport)
        for clock in (self._clock, self._stalled, self._head):
            if clock is not None:
                clock.cancel()
        self._clock = self._stalled = self._head = self._transport = None
