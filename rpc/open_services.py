"""grpclib's own services, health and reflection, which anyone may call: what a client does wrong there is told to that
client, and no call of theirs waits without end for a message, or for its answer to be taken.

grpclib takes a message that is compressed, broken or missing for an error of the service, and logs it with its trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from rpc import outbound
from saga.door_limits import BODY_SECS

OPEN_SERVICES = frozenset(
    {
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
)
"""The one is what probes read, the other says no more than `/openapi.json`."""

Method = Callable[[Stream[Any, Any]], Awaitable[None]]


class Guarded:
    """One of `OPEN_SERVICES`, as its server wants to have it. `ValueError`: it is another one, and would be open to
    everybody unseen."""

    def __init__(self, service: Any) -> None:
        self._service = service
        others = {path for path in service.__mapping__() if path.split("/")[1] not in OPEN_SERVICES}
        if others:
            raise ValueError(f"nobody declared who may call {', '.join(sorted(others))}")

    def __mapping__(self) -> dict[str, Handler]:
        return {
            path: handler._replace(func=_guarded(handler.func, handler.cardinality.client_streaming))
            for path, handler in self._service.__mapping__().items()
        }


def _guarded(method: Method, may_say_nothing: bool) -> Method:
    async def guarded(stream: Stream[Any, Any]) -> None:
        read, write = stream.recv_message, stream.send_message
        began = False

        async def recv_message() -> Any:
            nonlocal began
            try:
                # Between the messages of a stream a client may take its time; its connection counts as idle.
                async with asyncio.timeout(None if began else BODY_SECS):
                    message = await read()
            except TimeoutError:
                raise _wrong(f"the message did not arrive within {BODY_SECS:g} s") from None
            except NotImplementedError:
                raise GRPCError(Status.UNIMPLEMENTED, "compressed messages are not supported") from None
            except DecodeError:
                raise _wrong("the bytes are no message of this method") from None
            if message is None and not may_say_nothing:
                raise _wrong("the call carried no message")
            began = True
            return message

        async def send_message(message: Any) -> None:
            await outbound.taken(stream, write(message))

        stream.recv_message = recv_message  # type: ignore[method-assign]
        stream.send_message = send_message  # type: ignore[method-assign]
        await method(stream)

    return guarded


def _wrong(message: str) -> GRPCError:
    return GRPCError(Status.INVALID_ARGUMENT, message)
