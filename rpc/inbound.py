"""Reading request messages with bounds on their size, and on the time and the room they take to come.

grpclib's own `recv_message` collects whatever length the client announces, so one call could fill the memory; here the
announced length is looked at before anything is collected.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from rpc.server_errors import CompressedMessage
from saga.door_limits import BODY_SECS, BodyRoom
from saga.errors import Detail, Invalid, PayloadTooLarge

M = TypeVar("M", bound=Message)

PIECE_BYTES = 64 * 1024
"""How much of a message is read at a time; the window has room for several, so that none is waited for."""

_PREFIX = struct.Struct(">?I")


class CutShort(GRPCError):
    """The client ended the call in the middle of a message."""

    def __init__(self) -> None:
        super().__init__(Status.INVALID_ARGUMENT, "the message is cut short")


class Received:
    """What has come of a call's messages and was not read, in the place of grpclib's buffer.

    That one keeps an object for each frame, so that a client makes a hundred bytes of each that it sends; it keeps
    empty frames too, for which a window is no bound, and takes one for the end of the message.
    """

    def __init__(self, make_room: Callable[[int], None]) -> None:
        """`make_room`: lets the client send so many bytes more."""
        self._make_room = make_room
        self._data = bytearray()
        self._unacked = 0
        self._ended = False
        self._more = asyncio.Event()

    def add(self, data: bytes, ack_size: int) -> None:
        """Called by grpclib for every DATA frame, which took `ack_size` of the window."""
        self._data += data
        self._unacked += ack_size
        self._more.set()

    def eof(self) -> None:
        """Called by grpclib at END_STREAM."""
        self._ended = True
        self._more.set()

    def unacked_size(self) -> int:
        """Asked by grpclib when the stream is given back."""
        unacked, self._unacked = self._unacked, 0
        return unacked

    async def read(self, size: int) -> bytes:
        """So many bytes; none if the call has ended before the first. `CutShort`: before the last. `GRPCError`: more
        than is taken of those whom grpclib reads for, health and reflection."""
        if size > PIECE_BYTES:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"the message has {size} bytes, the limit is {PIECE_BYTES}")
        while True:
            # Room is made as soon as it is read for: many calls share the window of their connection.
            self._make_room(self.unacked_size())
            if len(self._data) >= size or self._ended:
                break
            self._more.clear()
            await self._more.wait()
        if not self._data and size:
            return b""
        if len(self._data) < size:
            raise CutShort
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken


async def receive(stream: Stream[Any, Any], message_type: type[M], max_bytes: int, room: BodyRoom) -> M:
    """The one message of the call.

    `Invalid`: there is none, it is cut short, does not come in time, or its bytes are no `message_type`.
    `PayloadTooLarge`: over `max_bytes`; it is not read. `Overloaded`: over what is left of the `room`.
    `CompressedMessage`.
    """
    name = message_type.DESCRIPTOR.full_name
    try:
        async with asyncio.timeout(BODY_SECS):
            data = await _bytes(stream, name, max_bytes, room)
    except TimeoutError:
        raise _no_message(name, f"the message did not arrive within {BODY_SECS:g} s") from None
    except CutShort as error:
        raise _no_message(name, str(error.message)) from None
    try:
        return message_type.FromString(data)
    except DecodeError:
        raise _no_message(name, f"the bytes are no {name}") from None


async def _bytes(stream: Stream[Any, Any], name: str, max_bytes: int, room: BodyRoom) -> bytes:
    http2 = stream._stream  # grpclib offers the message only whole
    prefix = await http2.recv_data(_PREFIX.size)
    if not prefix:
        raise _no_message(name, "the call carried no message")
    compressed, length = _PREFIX.unpack(prefix)
    if compressed:
        raise CompressedMessage("compressed messages are not supported")
    if length > max_bytes:
        message = f"the message has {length} bytes, the limit is {max_bytes}"
        raise PayloadTooLarge(message, (Detail(field="payload", reason="too_large", message=message),))
    data = bytearray()
    with room.body() as has:
        while len(data) < length:
            piece = await http2.recv_data(min(PIECE_BYTES, length - len(data)))
            if not piece:
                raise CutShort
            data += piece
            # Counted as it comes: a length that is only announced takes no room from others.
            has(len(data))
        return bytes(data)


def _no_message(name: str, message: str) -> Invalid:
    return Invalid(message, (Detail(field="", reason="malformed", message=f"expected one {name}"),))
