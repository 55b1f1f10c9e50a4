"""Reading one request message with bounds on its size, and on the time and the room it takes to come.

grpclib's own `recv_message` collects whatever length the client announces, so one call could fill the memory; here the
announced length is looked at before anything is collected.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from grpclib.server import Stream

from rpc.server_errors import CompressedMessage
from saga.door_limits import BodyRoom
from saga.errors import Detail, Invalid, PayloadTooLarge

M = TypeVar("M", bound=Message)

MESSAGE_SECS = 30.0
"""How long a whole message may take. A guess: a 1 MiB payload at 300 kbit/s, as over HTTP."""

PIECE_BYTES = 64 * 1024

_PREFIX = struct.Struct(">?I")


async def receive(stream: Stream[Any, Any], message_type: type[M], max_bytes: int, room: BodyRoom) -> M:
    """The one message of the call.

    `Invalid`: there is none, it is cut short, does not come in time, or its bytes are no `message_type`.
    `PayloadTooLarge`: over `max_bytes`; it is not read. `Overloaded`: over what is left of the `room`.
    `CompressedMessage`.
    """
    name = message_type.DESCRIPTOR.full_name
    try:
        async with asyncio.timeout(MESSAGE_SECS):
            data = await _bytes(stream, name, max_bytes, room)
    except TimeoutError:
        raise _no_message(name, f"the message did not arrive within {MESSAGE_SECS:g} s") from None
    except AssertionError:  # what grpclib's buffer raises when the stream ends early
        raise _no_message(name, "the message is cut short") from None
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
    pieces: list[bytes] = []
    size = 0
    with room.body() as has:
        while size < length:
            piece = await http2.recv_data(min(PIECE_BYTES, length - size))
            if not piece:
                raise _no_message(name, "the message is cut short")
            size += len(piece)
            # Counted as it comes: a length that is only announced takes no room from others.
            has(size)
            pieces.append(piece)
        return b"".join(pieces)


def _no_message(name: str, message: str) -> Invalid:
    return Invalid(message, (Detail(field="", reason="malformed", message=f"expected one {name}"),))
