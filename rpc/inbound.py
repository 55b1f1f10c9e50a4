"""Reading one request message with a bound on its size.

grpclib's own `recv_message` collects whatever length the client announces, so one call could fill the memory; here the
announced length is looked at before anything is collected.
"""

from __future__ import annotations

import struct
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message
from grpclib.server import Stream

from rpc.server_errors import CompressedMessage
from saga.errors import Detail, Invalid, PayloadTooLarge

M = TypeVar("M", bound=Message)

_PREFIX = struct.Struct(">?I")


async def receive(stream: Stream[Any, Any], message_type: type[M], max_bytes: int) -> M:
    """The one message of the call.

    `Invalid`: there is none, it is cut short, or its bytes are no `message_type`. `PayloadTooLarge`: over `max_bytes`;
    it is not read. `CompressedMessage`.
    """
    name = message_type.DESCRIPTOR.full_name
    http2 = stream._stream  # grpclib offers the message only whole
    try:
        prefix = await http2.recv_data(_PREFIX.size)
        if not prefix:
            raise _no_message(name, "the call carried no message")
        compressed, length = _PREFIX.unpack(prefix)
        if compressed:
            raise CompressedMessage("compressed messages are not supported")
        if length > max_bytes:
            message = f"the message has {length} bytes, the limit is {max_bytes}"
            raise PayloadTooLarge(message, (Detail(field="payload", reason="too_large", message=message),))
        data = await http2.recv_data(length)
    except AssertionError:  # what grpclib's buffer raises when the stream ends early
        raise _no_message(name, "the message is cut short") from None
    try:
        return message_type.FromString(data)
    except DecodeError:
        raise _no_message(name, f"the bytes are no {name}") from None


def _no_message(name: str, message: str) -> Invalid:
    return Invalid(message, (Detail(field="", reason="malformed", message=f"expected one {name}"),))
