"""One HTTP/2 connection to a participant: grpclib's protocol classes on the asyncio transport.

What grpclib does otherwise and participants need differently is overridden in `_Events` and `Link`, each with its
reason: graceful GOAWAY, REFUSED_STREAM, unknown frames, non-ASCII headers.

The calls on a connection are `exchange.py`, choosing one is `channels.py`, what a status means is `outcomes.py`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Callable, Iterable
from typing import Any, cast

import trio
from grpclib.config import Configuration
from grpclib.protocol import AbstractHandler, Connection, EventsProcessor, H2Protocol, Stream
from h2.config import H2Configuration
from h2.events import ConnectionTerminated, Event, PingAckReceived, RemoteSettingsChanged, ResponseReceived, StreamReset
from h2.exceptions import ProtocolError as Http2Error
from hpack import Encoder
from hpack.hpack import encode_integer
from hyperframe.frame import Frame, GoAwayFrame

from bridge import running_loop
from rpc.exchange import UnaryExchange
from rpc.outcomes import closed_after_handshake, in_doubt, lost_by_reset, not_done

log = logging.getLogger("saga.rpc")

KEEPALIVE_SECS = 330.0
"""Between pings on a connection with calls in flight. grpc servers drop a client that pings more often than every 300 s
without data ("too_many_pings"), so this cannot be shorter; what must be noticed sooner is noticed by TCP keepalive
(a host that is gone) and by the ping after a silent deadline (a process that is frozen, `Link.suspect`)."""

UNSENT_BYTES = 4 * 1024 * 1024
"""What may wait for a peer to read it: requests wait elsewhere, so it is answers to its pings and settings, which
grpclib keeps without bounds."""

HTTP2_CONFIG = H2Configuration(
    client_side=True,
    # Participants may put any byte into a header; latin-1 takes them all where ascii would raise and, in grpclib, take
    # the connection and everybody else's calls down.
    header_encoding="latin-1",
    validate_inbound_headers=False,
    validate_outbound_headers=False,
    normalize_inbound_headers=False,
    normalize_outbound_headers=False,
)


class _PlainEncoder(Encoder):
    """Writes each header as a literal that goes into no table, without Huffman coding.

    hpack's own way took a quarter of a whole call: it searches its tables for every header, and the ids and keys that
    differ in each call push the ones that do not out of the table. This costs some 300 bytes a call on the wire.
    """

    def encode(self, headers: Iterable[Any], huffman: bool = True) -> bytes:
        block = bytearray()
        if self.header_table.resized:
            # The peer may shrink the table we do not use; HTTP/2 wants to see that we have heard it.
            block += self._encode_table_size_change()
            self.header_table.resized = False
        for name, value in headers:
            block.append(0)
            for text in (name, value):
                length = len(text)
                if length < 127:
                    block.append(length)
                else:
                    block += encode_integer(length, 7)
                block += text
        return bytes(block)


class _Events(EventsProcessor):
    """grpclib's event table, but each stream learns its own fate exactly."""

    def __init__(self, handler: AbstractHandler, connection: Connection, link: Link) -> None:
        super().__init__(handler, connection)
        self._link = link

    def exchange(self, stream_id: int | None) -> UnaryExchange | None:
        """The call on this stream, if it is still waited for."""
        return cast("UnaryExchange | None", self.streams.get(stream_id or 0))

    def exchanges(self) -> list[UnaryExchange]:
        """The calls in flight."""
        return cast("list[UnaryExchange]", list(self.streams.values()))

    def process(self, event: Event) -> None:
        # grpclib raises for events it has no row for (an unknown frame type, a 1xx answer), which would close the
        # connection. HTTP/2 says: ignore them.
        if event.__class__ in getattr(self, "processors", ()):
            super().process(event)

    def process_response_received(self, event: ResponseReceived) -> None:
        super().process_response_received(event)
        self._link.last_answered = trio.current_time()

    def process_stream_reset(self, event: StreamReset) -> None:
        exchange = self.exchange(event.stream_id)
        if exchange is not None:
            exchange.fail(
                lost_by_reset(event.error_code)
                if event.remote_reset
                else in_doubt("INTERNAL", "the participant broke the HTTP/2 protocol on this stream")
            )
        self.connection.streams_failed += 1

    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        self._link.go_away(event)

    def process_remote_settings_changed(self, event: RemoteSettingsChanged) -> None:
        super().process_remote_settings_changed(event)
        self._link.settled()
        self._link.on_change()

    def process_ping_ack_received(self, event: PingAckReceived) -> None:
        super().process_ping_ack_received(event)
        self._link.suspected_at = None


class _Closed(AbstractHandler):
    """Tells the link that its connection is gone."""

    def __init__(self) -> None:
        self.link: Link | None = None

    def accept(self, stream: Stream, headers: Any, release_stream: Callable[[], None]) -> None:
        """Servers do not open streams to us: push is off."""

    def cancel(self, stream: Stream) -> None:
        """The stream itself has been told."""

    def close(self) -> None:
        if self.link is not None:
            self.link.note_closed()


class Link(H2Protocol):
    """One connection to `authority`. `on_change` is called whenever it may take more or fewer calls than before, or is
    gone.

    `ready` is done when the peer has said how many calls it takes. A call sent before that might be one too many, which
    some servers answer in a way that leaves it in doubt; and a process that is frozen never says it.
    `closed`: nothing can be sent. `leaving`: calls in flight may finish, new ones go elsewhere. `suspected_at`: when a
    ping was sent because the peer may be frozen; None: it is not suspected. `gone` is done when the connection has
    ended, which a TLS one does some time after it was closed: both sides say goodbye.
    """

    processor: _Events

    def __init__(self, authority: str, on_change: Callable[[], None], ping_timeout_secs: float) -> None:
        handler = _Closed()
        super().__init__(
            handler,
            Configuration(
                _keepalive_time=KEEPALIVE_SECS,
                _http2_max_pings_without_data=0,
                _http2_min_sent_ping_interval_without_data=KEEPALIVE_SECS - 10,
            ).__for_client__(),
            HTTP2_CONFIG,
        )
        handler.link = self
        self.authority = authority
        self.on_change = on_change
        self.closed = False
        self.leaving = False
        self.ready: asyncio.Future[None] = running_loop().create_future()
        self.gone: asyncio.Future[None] = running_loop().create_future()
        self._transport: Any = None  # grpclib forgets it at close, before the connection has ended
        self._encrypted = False
        self.in_flight = 0
        self.suspected_at: float | None = None
        self._flush_is_due = False
        self.last_heard = self.last_answered = -math.inf
        self._last_ping = -math.inf
        self._ping_timeout_secs = ping_timeout_secs

    def settled(self) -> None:
        """The peer's settings have come."""
        if not self.ready.done():
            self.ready.set_result(None)

    def note_closed(self) -> None:
        """The connection is gone."""
        self.closed = True
        if not self.ready.done():
            self.ready.set_exception(ConnectionError("the connection was closed before it could be used"))
        self.on_change()

    def exchange(self, answer_limit: int) -> UnaryExchange:
        """A call to be made on this connection; its answer may have `answer_limit` bytes."""
        return UnaryExchange(self, answer_limit)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._transport = transport
        self._encrypted = transport.get_extra_info("ssl_object") is not None
        self.processor = _Events(self.handler, self.connection, self)
        self.connection._connection.encoder = _PlainEncoder()
        # h2 closes its state machine at GOAWAY, and with it the streams the peer still means to answer: a participant
        # that restarts gracefully would leave every call in flight in doubt. We only note it.
        self.connection._connection._frame_dispatch_table[GoAwayFrame] = _note_goaway
        _watch_with_tcp(transport.get_extra_info("socket"))
        self.last_heard = trio.current_time()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._encrypted and not self.ready.done():
            self.ready.set_exception(closed_after_handshake(exc if isinstance(exc, Exception) else None))
        super().connection_lost(exc)
        if not self.gone.done():
            self.gone.set_result(None)

    def abort(self) -> None:
        """Cuts the connection off at once; what was to be sent is not."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.last_heard = trio.current_time()
        if self.suspected_at is not None:
            self.suspected_at = None
            self.on_change()
        if self.closed:
            return  # grpclib takes its connection apart at close; later chunks have nowhere to go
        try:
            super().data_received(data)
            if not self.closed:
                self._refuse_overlong_frame()
                if self._transport.get_write_buffer_size() > UNSENT_BYTES:
                    raise ConnectionError("it asks and does not read the answers")
        except Exception as error:  # noqa: BLE001  (whatever a peer can provoke in the parser ends this connection only)
            if not self.closed:
                log.warning("participant_connection_broken authority=%s error=%r", self.authority, error)
                self.abandon(f"unreadable HTTP/2: {error!r}")

    def _refuse_overlong_frame(self) -> None:
        """h2 checks the length of a frame when all of it has come, so a peer that speaks HTTP/1.1, whose letters are
        read as a length of megabytes, would be waited for until the deadline."""
        incoming = self.connection._connection.incoming_buffer
        head = incoming._data[:3]
        if len(head) == 3 and int.from_bytes(head, "big") > incoming.max_frame_size:
            raise Http2Error("a frame longer than agreed, or no HTTP/2")

    def resume_writing(self) -> None:
        super().resume_writing()
        for exchange in self.processor.exchanges():
            exchange.wake()

    def go_away(self, event: ConnectionTerminated) -> None:
        """The peer takes no new calls. Those it says it has not looked at are not done; the others may finish."""
        self.leaving = True
        last = event.last_stream_id if event.last_stream_id is not None else 0
        code = getattr(event.error_code, "name", event.error_code)
        for exchange in self.processor.exchanges():
            if exchange.id > last:
                exchange.fail(not_done("UNAVAILABLE", f"the participant goes away ({code}) and did not take the call"))
        self.on_change()
        self.close_if_idle()

    @property
    def usable(self) -> bool:
        """It takes calls, now or when others have ended."""
        return not (self.closed or self.leaving or self.suspected_at is not None or self.connection.is_closing())

    @property
    def room(self) -> int:
        """How many more calls it takes now."""
        if not self.usable:
            return 0
        most = self.connection._connection.remote_settings.max_concurrent_streams
        return int(most) - self.in_flight

    def retire_after(self, calls: int) -> None:
        """Stream ids end at 2^31: past `calls` calls this connection takes no more."""
        if (self.connection._connection.highest_outbound_stream_id + 1) // 2 >= calls:
            self.leaving = True

    def close_if_idle(self) -> None:
        if self.leaving and not self.in_flight and not self.closed:
            self.abandon("no longer needed")

    def flush_soon(self) -> None:
        """Has what was framed written in the loop's next turn, together with what other calls frame until then: a write
        is a system call, and a group commit wakes many sagas at once."""
        if not self._flush_is_due:
            self._flush_is_due = True
            running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if not self.closed:
            self.connection.flush()

    def abandon(self, reason: str) -> None:
        """Closes the connection; calls in flight are in doubt."""
        self.processor.close(reason)

    def suspect_if_silent(self, since: float) -> None:
        """A deadline has passed on this link. If nothing at all was heard `since` the call began, the peer may be
        frozen: it is sent one ping, takes no new calls until something is heard, and is given up if nothing is.

        Not more often than servers allow without data between (see `KEEPALIVE_SECS`).
        """
        now = trio.current_time()
        if self.closed or self.suspected_at is not None or self.last_heard > since:
            return
        if now - self._last_ping < KEEPALIVE_SECS and self._last_ping > self.last_answered:
            return
        self.suspected_at = self._last_ping = now
        self.connection._connection.ping(b"suspect!")
        self.connection.flush()
        running_loop().call_later(self._ping_timeout_secs, self._abandon_if_silent)

    def _abandon_if_silent(self) -> None:
        if self.suspected_at is not None and not self.closed:
            silent_secs = trio.current_time() - self.last_heard
            log.warning("participant_frozen authority=%s silent_secs=%.1f", self.authority, silent_secs)
            self.abandon("the participant does not answer pings")


def _note_goaway(frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
    event = ConnectionTerminated()
    event.error_code = frame.error_code
    event.last_stream_id = frame.last_stream_id
    event.additional_data = frame.additional_data or None
    return [], [event]


def _watch_with_tcp(sock: Any) -> None:
    """Has the kernel notice a host that is gone within about 45 s, which costs the participant's pings nothing."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 5), ("TCP_USER_TIMEOUT", 45_000)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
