"""A grpclib server that can be drained, and that takes on a bounded number of connections and calls.

grpclib 0.4.9 `Server.close()` cancels running calls at once and tells their clients nothing (one without a deadline
waits for ever), and it never closes the connections, so that `wait_closed()` hangs on Python 3.12+ for as long as a
client stays connected. `drain` lets calls finish, refuses new ones with a status, and closes the connections. The few
private names of grpclib used for it are all in this file.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.metadata import encode_bin_value
from grpclib.protocol import Buffer, H2Protocol, Stream
from grpclib.server import Handler, Server
from h2.errors import ErrorCodes

from rpc.guarded_h2 import NEEDED, GuardedH2Protocol, Turns
from rpc.handshakes import Context, Handshakes
from rpc.inbound import Received
from rpc.server_errors import Failure, ShuttingDown, failure
from saga.door_limits import DoorLimits, Places, Room, check_header_count
from saga.errors import Invalid

LAST_REPLY_SECS = 0.1
"""Between the last reply and GOAWAY: a grpclib client that reads both in one chunk throws the reply away."""
ENDLESS = frozenset(
    {
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
"""Calls that end only when their client wants it, and that anyone may make: a drain does not wait for them, their
connections count as idle, and they take no other calls' places."""
PROBE = "/grpc.health.v1.Health/Check"
"""The call that is answered however many others there are, lest a busy server is taken for a broken one."""
WINDOW_BYTES = 512 * 1024
WINDOWS = Configuration(http2_connection_window_size=WINDOW_BYTES, http2_stream_window_size=WINDOW_BYTES)
"""What a client may send ahead of our reading, on a connection and on each of its streams. With `max_connections` it
bounds what lies there unread; over a round trip of 50 ms it lets 10 MB/s through."""
CLOSE_SECS = 2.0
"""How long a connection may take to flush what is still to be sent before it is cut. A guess."""


class _RefusingHandler(Handler):
    """The calls of one connection; while `refusing`, new ones get UNAVAILABLE."""

    refusing = False
    connection: GuardedH2Protocol

    def __init__(self, room: Room, endless_room: Room, *args: Any, **kwargs: Any) -> None:
        """`room`: for the calls of all connections; `endless_room`: for those of `ENDLESS`."""
        super().__init__(*args, **kwargs)
        self._room = room
        self._endless_room = endless_room
        self._endless: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()

    def accept(self, stream: Stream, headers: list[tuple[str, str]], release_stream: Callable[[], Any]) -> None:
        if not dict(headers).keys() >= NEEDED:
            stream.reset_nowait(ErrorCodes.PROTOCOL_ERROR)
            release_stream()
        elif (reason := self._against(headers)) is not None:
            # Kept with the other tasks: a reset of the stream looks for it there.
            self._tasks[stream] = self.loop.create_task(_refuse(stream, release_stream, failure(reason)))
        else:
            assert stream.id is not None
            stream.buffer = cast(Buffer, Received(partial(stream.connection.ack, stream.id)))
            super().accept(stream, headers, release_stream)
            task = self._tasks[stream]
            room = self._room_of(headers)
            if room is self._endless_room:
                self._endless.add(task)
            room.taken += 1
            self._note_calls()
            task.add_done_callback(partial(self._call_ended, room))

    def _against(self, headers: list[tuple[str, str]]) -> Exception | None:
        """What speaks against taking this call; None: nothing."""
        if self.refusing:
            return ShuttingDown("the server is shutting down")
        room = self._room_of(headers)
        if room.is_full and dict(headers)[":path"] != PROBE:
            return room.refusal()
        try:
            check_header_count(len(headers))
        except Invalid as error:
            return error
        return None

    def _room_of(self, headers: list[tuple[str, str]]) -> Room:
        return self._endless_room if dict(headers)[":path"] in ENDLESS else self._room

    def _call_ended(self, room: Room, task: asyncio.Task[None]) -> None:
        room.give()
        self._note_calls()

    def _note_calls(self) -> None:
        running = [call for call in self._tasks.values() if not call.done()]
        self.connection.note_calls(bool(running), is_busy=any(call not in self._endless for call in running))

    def awaited(self) -> list[asyncio.Task[None]]:
        """The calls that a drain should wait for."""
        return [call for call in self._tasks.values() if not call.done() and call not in self._endless]


class DrainingServer(Server):
    """As grpclib's, with `drain`. Asyncio-flavoured."""

    def __init__(self, *args: Any, limits: DoorLimits, tls: Context | None = None, **kwargs: Any) -> None:
        """`tls`: asked for the context of each new connection; None: cleartext."""
        super().__init__(*args, **kwargs)
        self._handshakes = None if tls is None else Handshakes(tls)
        self._protocols: weakref.WeakSet[H2Protocol] = weakref.WeakSet()
        self._refusing = False
        self._places: Places[object] = Places(limits.max_connections)
        self._turns = Turns()
        self._room = Room(limits.max_requests, "calls")
        self._endless_room = Room(limits.max_requests, "watches of health and reflections")

    @property
    def port(self) -> int:
        """The port it listens on, also when it was started with 0."""
        assert isinstance(self._server, asyncio.base_events.Server)
        return int(self._server.sockets[0].getsockname()[1])

    def _protocol_factory(self) -> asyncio.Protocol:  # type: ignore[override]  # what it is for needs no more
        if self._handshakes is not None:
            return self._handshakes.before(self._http2)
        return self._http2()

    def _http2(self) -> H2Protocol:
        self.__gc_step__()
        handler = _RefusingHandler(
            *(self._room, self._endless_room),
            *(self._mapping, self._codec, self._status_details_codec, self.__dispatch__),
        )
        handler.refusing = self._refusing  # a connection may still come out of the backlog while we drain
        self._handlers.add(handler)
        protocol = GuardedH2Protocol(handler, self._config, self._h2_config, self._places, self._turns)
        handler.connection = protocol
        self._protocols.add(protocol)
        return protocol

    async def drain(self, grace_secs: float) -> None:
        """Stops: no new connection, new calls get UNAVAILABLE, running calls have `grace_secs`, then all is closed."""
        assert self._server is not None
        self._refusing = True
        self._server.close()
        if self._handshakes is not None:
            self._handshakes.cut()
        calls = []
        for handler in self._handlers:
            assert isinstance(handler, _RefusingHandler)
            handler.refusing = True
            calls += handler.awaited()
        if calls:
            await asyncio.wait(calls, timeout=grace_secs)
        self.close()
        await asyncio.sleep(LAST_REPLY_SECS)
        transports = []
        for protocol in list(self._protocols):
            connection = getattr(protocol, "connection", None)
            if connection is None or connection.is_closing():
                continue
            transports.append(connection._transport)
            connection._connection.close_connection()  # GOAWAY
            connection.flush()
            protocol.processor.close("server shutdown")
        try:
            await asyncio.wait_for(self.wait_closed(), CLOSE_SECS)
        except TimeoutError:
            for transport in transports:
                transport.abort()


async def _refuse(stream: Stream, release: Callable[[], Any], told: Failure) -> None:
    details = ProtoStatusDetailsCodec().encode(told.status, told.message, told.details)
    # A content-type goes with it; without one a grpclib client reports UNKNOWN whatever the status says.
    try:
        await stream.send_headers(
            [
                (":status", "200"),
                ("content-type", "application/grpc+proto"),
                ("grpc-status", str(told.status.value)),
                ("grpc-message", told.message),
                ("grpc-status-details-bin", encode_bin_value(details).decode("ascii")),
            ],
            end_stream=True,
        )
    finally:
        release()
