"""Sending one message of an answer with a bound on the time a client takes for it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from google.protobuf.message import Message
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Stream

log = logging.getLogger("saga.rpc.server")

ANSWER_SECS = 60.0
"""A guess: a saga of 1 MiB at 150 kbit/s."""


async def send(stream: Stream[Any, Any], message: Message) -> None:
    """Returns when the message is on its way. A client that makes no room for it loses the call
    (`StreamTerminatedError`): it may never make any."""
    try:
        async with asyncio.timeout(ANSWER_SECS):
            await stream.send_message(message)
    except TimeoutError:
        log.info("grpc_answer_not_taken")
        await stream.cancel()
        raise StreamTerminatedError("the answer was not taken in time") from None
