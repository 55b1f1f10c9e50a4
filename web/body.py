"""Reading a request's body with bounds on its size and on the time it takes to come.

A body that is too big is refused, but first what is still coming is swallowed for a moment: to answer and close while a
client is sending makes its system drop our answer (HTTP/1.1), and hypercorn 0.18 ends a whole HTTP/2 connection for
data on a stream that was answered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from saga.door_limits import BODY_SECS
from saga.errors import Detail, Invalid, Overloaded, PayloadTooLarge, RequestError, Unavailable

SWALLOW_BYTES = 16 * 1024 * 1024
SWALLOW_SECS = 2.0
"""How much, and for how long, of a refused body is read and thrown away."""

Receive = Callable[[], Awaitable[dict[str, Any]]]


class ClientGone(Exception):
    """The client went away before its body was complete."""


class Unread(Exception):
    """The body is refused for `reason` and was not read to its end, so the connection cannot be used again."""

    def __init__(self, reason: RequestError | Unavailable) -> None:
        super().__init__(str(reason))
        self.reason = reason


async def read_body(receive: Receive, max_bytes: int, has: Callable[[int], None] = lambda size: None) -> bytes:
    """The whole body. `PayloadTooLarge` and, if the body did not end, `Unread`; `ClientGone`. `has` is told the length
    as it grows; if it raises `Overloaded`, so does this, as `Unread`."""
    # One buffer: a list of chunks of a byte each would take fifty times as much.
    body = bytearray()
    size = 0
    with trio.move_on_after(BODY_SECS):
        while size <= max_bytes:
            chunk, more = await _next(receive)
            size += len(chunk)
            try:
                has(size)
            except Overloaded as error:
                raise Unread(error) from None
            if not body and not more and size <= max_bytes:
                return chunk
            body += chunk
            if not more and size <= max_bytes:
                return bytes(body)
            if not more:
                raise too_large(max_bytes)
        body.clear()
        if await discard_body(receive):
            raise too_large(max_bytes)
        raise Unread(too_large(max_bytes))
    message = f"the body did not arrive within {BODY_SECS:g} s"
    raise Unread(Invalid(message, (Detail(field="", reason="timeout", message=message),)))


async def discard_body(receive: Receive) -> bool:
    """Throws away what is left of a body that is refused; False: it did not end within bounds. `ClientGone`."""
    size = 0
    with trio.move_on_after(SWALLOW_SECS):
        while size <= SWALLOW_BYTES:
            chunk, more = await _next(receive)
            size += len(chunk)
            if not more:
                return True
    return False


def too_large(max_bytes: int) -> PayloadTooLarge:
    """The error for a body over the limit."""
    message = f"the body is over the limit of {max_bytes} bytes"
    return PayloadTooLarge(message, (Detail(field="", reason="too_large", message=message),))


async def _next(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)
