"""The participant of the benchmarks: a grpclib server with reflection that answers at once (`Hang`: never) and
remembers nothing.

`python -m bench.participant` prints its port on the first line and serves until its standard input closes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpclib.const import Cardinality, Handler
from grpclib.reflection.service import ServerReflection
from grpclib.server import Server, Stream

SERVICE = "bench.Participant"
METHOD = f"/{SERVICE}/Do"


def _message(name: str, **fields: int) -> descriptor_pb2.DescriptorProto:
    message = descriptor_pb2.DescriptorProto(name=name)
    for number, (field, kind) in enumerate(fields.items(), start=1):
        message.field.add(
            name=field, number=number, type=kind, label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
        )
    return message


_FIELD = descriptor_pb2.FieldDescriptorProto
_FILE = descriptor_pb2.FileDescriptorProto(name="bench/participant.proto", package="bench", syntax="proto3")
_FILE.message_type.append(_message("Request", order_id=_FIELD.TYPE_STRING, quantity=_FIELD.TYPE_INT32))
_FILE.message_type.append(_message("Reply", id=_FIELD.TYPE_STRING, done=_FIELD.TYPE_BOOL))
_METHODS = _FILE.service.add(name="Participant")
for _name in ("Do", "Undo", "Hang"):
    _METHODS.method.add(name=_name, input_type=".bench.Request", output_type=".bench.Reply")
descriptor_pool.Default().AddSerializedFile(_FILE.SerializeToString())

Request: Any = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName("bench.Request"))
Reply: Any = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName("bench.Reply"))


class Participant:
    """Does nothing, quickly."""

    async def answer(self, stream: Stream[Any, Any]) -> None:
        request = await stream.recv_message()
        assert request is not None
        await stream.send_message(Reply(id=request.order_id, done=True))

    async def hang(self, stream: Stream[Any, Any]) -> None:
        await asyncio.Event().wait()

    def __mapping__(self) -> dict[str, Handler]:
        methods = {"Do": self.answer, "Undo": self.answer, "Hang": self.hang}
        return {
            f"/{SERVICE}/{name}": Handler(method, Cardinality.UNARY_UNARY, Request, Reply)
            for name, method in methods.items()
        }


async def main() -> None:
    # Workers are killed in mid-call: what asyncio has to say of that is no news.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    server = Server(ServerReflection.extend([Participant()]))
    # A port of our own choice, not a socket: asyncio turns Nagle off only on sockets it made itself (their protocol
    # number says TCP); with Nagle every call alone on its connection takes 40 ms.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    await server.start("127.0.0.1", port)
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
