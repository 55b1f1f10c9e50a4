"""Sending one message of an answer with bounds on the time a client takes for it, and on what waits for clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from google.protobuf.message import Message
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Stream

from saga.door_limits import BodyRoom

log = logging.getLogger("saga.rpc.server")

ANSWER_SECS = 60.0
"""A guess: a saga of 1 MiB at 150 kbit/s."""


async def send(stream: Stream[Any, Any], message: Message, room: BodyRoom) -> None:
    """Returns when the message is on its way. A client that makes no room for it loses the call
    (`StreamTerminatedError`): it may never make any. `Overloaded`: over what is left of the `room`."""
    with room.body() as has:
        has(message.ByteSize())
        await taken(stream, stream.send_message(message))


async def taken(stream: Stream[Any, Any], sending: Awaitable[None]) -> None:
    """Awaits the sending of a message. `StreamTerminatedError`: the client did not take it in time."""
    try:
        async with asyncio.timeout(ANSWER_SECS):
            await sending
    except TimeoutError:
        log.info("grpc_answer_not_taken peer=%s", client_of(stream))
        await stream.cancel()
        raise StreamTerminatedError("the answer was not taken in time") from None


def client_of(stream: Stream[Any, Any]) -> str | None:
    """The address at the other end."""
    peer = stream.peer
    found = None if peer is None else peer.addr()
    return found[0] if isinstance(found, tuple) else None
