"""One unary call on one connection (`http2.Link`), in Trio terms.

The connection's events arrive as plain function calls in the loop's task, so an exchange needs no asyncio task of its
own: it writes its frames, parks its Trio task and is rescheduled once, when the answer is whole or lost. That is what
makes a call cheap, makes a cancel reset the stream at once, and lets an answer be refused before it is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import msgspec
import trio
from grpclib.protocol import Stream
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError as Http2Error

from rpc.outcomes import Lost, in_doubt, not_done

if TYPE_CHECKING:
    from rpc.http2 import Link

Header = tuple[str, str]

PREFIX_BYTES = 5
"""Of a gRPC message: a flag (compressed) and the length, big endian."""


class Reply(msgspec.Struct, frozen=True):
    """What the participant answered: response headers, trailers (empty: it was trailers-only) and the message, None if
    there was none."""

    headers: dict[str, str]
    trailers: dict[str, str]
    body: bytes | None


class _Signal:
    """What grpclib takes for an `asyncio.Event`: it only ever calls `set`."""

    __slots__ = ("set",)

    def __init__(self, on_set: Callable[[], object]) -> None:
        self.set = on_set


def _nothing() -> None:
    return None


class _Body:
    """Collects the one message of an answer; what is over the limit is refused when its length is seen."""

    __slots__ = ("_exchange", "_limit", "_need", "data")

    def __init__(self, exchange: UnaryExchange, limit: int) -> None:
        self._exchange = exchange
        self._limit = limit
        self._need = 0
        self.data = bytearray()

    def add(self, data: bytes, flow_controlled_bytes: int) -> None:
        """Called by grpclib for every DATA frame."""
        exchange = self._exchange
        # Acknowledged at once: the limit, not the flow-control window, bounds what one answer may occupy.
        exchange.acknowledge(flow_controlled_bytes)
        if exchange.ended:
            return
        self.data += data
        if not self._need:
            if len(self.data) < PREFIX_BYTES:
                return
            if self.data[0]:
                exchange.fail(in_doubt("INTERNAL", "the answer is compressed, which was not offered", permanent=True))
                return
            length = int.from_bytes(self.data[1:PREFIX_BYTES], "big")
            if length > self._limit:
                exchange.fail(
                    in_doubt(
                        "RESOURCE_EXHAUSTED",
                        f"the answer has {length} bytes, the limit is {self._limit}",
                        permanent=True,
                    )
                )
                return
            self._need = PREFIX_BYTES + length
        if len(self.data) > self._need:
            exchange.fail(in_doubt("INTERNAL", "the answer holds more than one message", permanent=True))

    def eof(self) -> None:
        """Called by grpclib at END_STREAM; the exchange learns it from `__ended__`."""

    def unacked_size(self) -> int:
        """Asked by grpclib when the stream is given back."""
        return 0

    def message(self) -> bytes | None:
        """The whole message; None: there was none. Raises `Lost` where it broke off."""
        if not self.data:
            return None
        if len(self.data) != self._need:
            raise in_doubt("INTERNAL", "the answer ends in the middle of its message")
        return bytes(self.data[PREFIX_BYTES:])


class UnaryExchange:
    """One call on one `Link`: a request, and an answer or the reason there is none.

    To grpclib's events it is a stream: they set `headers` and `trailers`, add to `buffer` and call `__ended__` and
    `__terminated__`. Not a subclass of grpclib's, whose queue and events belong to an asyncio task; the caller's Trio
    task waits in `_park`. `left`: something of the call is on the wire.
    """

    def __init__(self, link: Link, answer_limit: int) -> None:
        self._link = link
        self._connection = link.connection
        self._h2 = link.connection._connection
        self._transport = link.connection._transport
        self.id = 0
        self.data_received = 0
        self.headers: Iterable[Header] | None = None
        self.trailers: Iterable[Header] | None = None
        self.headers_received = self.trailers_received = _Signal(_nothing)
        self.window_updated = _Signal(self.wake)
        self.buffer = _Body(self, answer_limit)
        self.ended = False
        self.left = False
        self._failure: Lost | None = None
        self._task: trio.lowlevel.Task | None = None
        self._give_back: Callable[[], None] | None = None

    # --- what grpclib's events call ---

    def acknowledge(self, flow_controlled_bytes: int) -> None:
        if flow_controlled_bytes:
            # No flush: `H2Protocol.data_received` flushes after each chunk.
            self._h2.acknowledge_received_data(flow_controlled_bytes, self.id)

    def __ended__(self) -> None:
        self.ended = True
        self.wake()

    def __terminated__(self, reason: str) -> None:
        self.fail(in_doubt("UNAVAILABLE", f"the connection to the participant was lost: {reason}"))

    def fail(self, failure: Lost) -> None:
        """Ends the exchange unless it has ended; a whole answer is never overridden by what comes after it."""
        if not self.ended:
            self.ended = True
            self._failure = failure
            self.wake()

    def wake(self) -> None:
        """Lets the caller's task look again."""
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None

    # --- the caller's side ---

    def open(self, headers: list[Header], request: bytes) -> int:
        """Sends the request headers and as much of the request as fits now; returns the bytes sent of it."""
        h2 = self._h2
        stream_id = h2.get_next_available_stream_id()
        h2.send_headers(stream_id, headers)
        self.id = stream_id
        self.left = True
        self._give_back = self._link.processor.register(cast(Stream, self))
        return self.push(request, 0)

    def push(self, request: bytes, offset: int) -> int:
        """Sends what fits of `request` from `offset`; returns the new offset."""
        h2, total = self._h2, len(request)
        while offset < total and self._connection.write_ready.is_set():
            room = min(h2.local_flow_control_window(self.id), h2.max_outbound_frame_size)
            if room <= 0:
                break
            chunk = request[offset : offset + room]
            offset += len(chunk)
            h2.send_data(self.id, chunk, end_stream=offset == total)
        self._link.flush_soon()
        return offset

    async def run(self, headers: list[Header], request: bytes) -> Reply:
        """Makes the call. Raises `Lost`; cancelled, it resets the stream before it returns."""
        message = b"\x00" + len(request).to_bytes(4, "big") + request
        try:
            try:
                sent = self.open(headers, message)
                while not self.ended:
                    await self._park()
                    if sent < len(message) and not self.ended:
                        sent = self.push(message, sent)
            except Http2Error as error:
                # The stream or connection was closed between two events; a reason that came before is better.
                reason = f"the connection broke off: {error or type(error).__name__}"
                self.fail(in_doubt("UNAVAILABLE", reason) if self.left else not_done("UNAVAILABLE", reason))
            if self._failure is not None:
                raise self._failure
            return self._reply()
        finally:
            self._close()

    async def _park(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _reply(self) -> Reply:
        if self.headers is None:
            raise in_doubt("INTERNAL", "the participant ended the call without headers")
        return Reply(dict(self.headers), dict(self.trailers or ()), self.buffer.message())

    def _close(self) -> None:
        """Resets the stream if it is still open, and gives its place back."""
        if not self.left:
            return
        self.ended = True
        stream = self._h2.streams.get(self.id)
        if stream is not None and not stream.closed and not self._link.closed and not self._transport.is_closing():
            self._h2.reset_stream(self.id, error_code=ErrorCodes.CANCEL)
            # Written even while the transport is full: a reset is 13 bytes, and the participant should stop now.
            self._transport.write(self._h2.data_to_send())
        if self._give_back is not None:
            self._give_back()
