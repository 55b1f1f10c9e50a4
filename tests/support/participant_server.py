"""The process behind `participants.participant`: a gRPC server of either flavour that does what its script says.

Run as a module; imports nothing of the product, so that asyncio is plain asyncio here. What a behaviour means is
written in `participants.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message_factory import GetMessageClass
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status as RichStatus


class Refusal(Exception):
    """The behaviour is a status."""

    def __init__(self, behaviour: dict[str, Any]) -> None:
        super().__init__(behaviour["status"])
        self.code = behaviour["status"]
        self.message = behaviour.get("message", "")
        self.details: bytes | None = None
        if "retry_after_secs" in behaviour:
            status = RichStatus(code=Code.Value(self.code), message=self.message)
            info = RetryInfo()
            seconds = behaviour["retry_after_secs"]
            info.retry_delay.seconds = int(seconds)
            info.retry_delay.nanos = round((seconds - int(seconds)) * 1e9)
            status.details.add().Pack(info)
            self.details = status.SerializeToString()


class Script:
    """The script and the journal: what every call does, and what it did."""

    def __init__(self, script: Path, journal: Path) -> None:
        self._script = script
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._past = [json.loads(line) for line in journal.read_text().splitlines()]
        self._begins = {entry["script"]: entry["after"] for entry in self._past if "script" in entry}
        """How many calls had come when a script was first followed; told by the journal after a restart."""
        keys = {entry["call_id"]: entry["metadata"].get("idempotency-key") for entry in self._past if "method" in entry}
        self._done = {keys[entry["call_id"]] for entry in self._past if entry.get("effect")}
        self._past = [entry for entry in self._past if "method" in entry]
        self._ids = itertools.count()
        os.set_blocking(sys.stdout.fileno(), False)

    def _note(self, call_id: str, **entry: Any) -> None:
        os.write(self._journal, json.dumps({"call_id": call_id, **entry}).encode() + b"\n")
        with contextlib.suppress(BlockingIOError):
            os.write(sys.stdout.fileno(), b".")

    def _behaviour(self, method: str) -> dict[str, Any]:
        script = json.loads(self._script.read_text())
        if script["number"] not in self._begins:
            # Counted here and not by the test: calls come while it writes the script.
            self._begins[script["number"]] = len(self._past)
            begin = {"script": script["number"], "after": len(self._past)}
            os.write(self._journal, json.dumps(begin).encode() + b"\n")
        methods = script["methods"]
        behaviours = methods.get(method, methods.get("*", []))
        used = 0
        if any("times" in behaviour for behaviour in behaviours):
            since = Counter(entry["method"] for entry in self._past[self._begins[script["number"]] :])
            used = since[method] if method in methods else sum(since.values())
        for behaviour in behaviours:
            if len(self._past) % behaviour.get("every", 1):
                continue
            if used < behaviour.get("times", sys.maxsize):
                return dict(behaviour)
            used -= behaviour["times"]
        return {"answer": {"ok": True}}

    async def play(
        self, service: str, method: str, metadata: dict[str, str], request: dict[str, Any], timeout_secs: float | None
    ) -> dict[str, Any] | bytes:
        """Does what the script says of this call; returns the answer, or raises Refusal."""
        behaviour = self._behaviour(method)
        call_id = f"{os.getpid()}-{next(self._ids)}"
        entry = {"service": service, "method": method, "metadata": metadata, "request": request}
        self._past.append(entry)
        self._note(call_id, **entry, timeout_secs=timeout_secs)
        try:
            if "delay_secs" in behaviour:
                await asyncio.sleep(behaviour["delay_secs"])
            if behaviour.get("die") == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if behaviour.get("at") == "before":
                os.kill(behaviour["kill"], signal.SIGKILL)
            silent = "status" in behaviour or "hang" in behaviour
            key = metadata.get("idempotency-key")
            if behaviour.get("effect", not silent) and not (behaviour.get("once") and key in self._done):
                self._done.add(key)
                self._note(call_id, effect=True)
            if behaviour.get("die") == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            if behaviour.get("at") == "after":
                os.kill(behaviour["kill"], signal.SIGKILL)
            if behaviour.get("hang"):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self._note(call_id, ended="cancelled")
            raise
        self._note(call_id, ended="answered")
        if "status" in behaviour:
            raise Refusal(behaviour)
        if "raw" in behaviour:
            return base64.b64decode(behaviour["raw"])
        answer: dict[str, Any] = behaviour.get("answer", {"ok": True})
        return answer


Play = Callable[[bytes, dict[str, str], float | None], Awaitable[bytes]]


def methods_of(script: Script, content: bytes, codec: str) -> tuple[dict[str, Play], list[str]]:
    """What each path does, bytes to bytes, and the names of the services."""
    pool = descriptor_pool.Default()
    paths: dict[str, Play] = {}
    services = []

    def play_of(method: MethodDescriptor) -> Play:
        request_class, answer_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)

        async def play(body: bytes, metadata: dict[str, str], timeout_secs: float | None) -> bytes:
            request = json.loads(body) if codec == "json" else json_format.MessageToDict(request_class.FromString(body))
            answer = await script.play(
                method.containing_service.full_name, method.name, metadata, request, timeout_secs
            )
            if isinstance(answer, bytes):
                return answer
            if codec == "json":
                return json.dumps(answer).encode()
            return json_format.ParseDict(answer, answer_class()).SerializeToString()

        return play

    for file in FileDescriptorSet.FromString(content).file:
        if file.package.startswith("google."):
            __import__(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
            continue
        pool.AddSerializedFile(file.SerializeToString())
        for item in file.service:
            service = pool.FindServiceByName(f"{file.package}.{item.name}")
            services.append(service.full_name)
            for method in service.methods:
                if not method.server_streaming:
                    paths[f"/{service.full_name}/{method.name}"] = play_of(method)
    return paths, services


async def serve_grpcio(options: argparse.Namespace, paths: dict[str, Play], services: list[str]) -> None:
    import grpc
    from grpc_reflection.v1alpha import reflection

    def handler(play: Play) -> grpc.RpcMethodHandler:
        async def handle(body: bytes, context: grpc.aio.ServicerContext) -> bytes:
            metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
            try:
                return await play(body, metadata, context.time_remaining())
            except Refusal as refusal:
                trailers = (("grpc-status-details-bin", refusal.details),) if refusal.details is not None else ()
                await context.abort(grpc.StatusCode[refusal.code], refusal.message, trailers)
                raise

        return grpc.unary_unary_rpc_method_handler(handle)

    handlers = {path: handler(play) for path, play in paths.items()}

    class Generic(grpc.GenericRpcHandler):  # type: ignore[misc]  # untyped library
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return handlers.get(details.method)

    server_options = [("grpc.so_reuseport", 0)]
    if options.max_streams:
        server_options.append(("grpc.max_concurrent_streams", options.max_streams))
    server = grpc.aio.server(options=server_options)
    server.add_generic_rpc_handlers((Generic(),))
    if options.reflection:
        reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)
    address = f"127.0.0.1:{options.port}"
    if options.tls_cert:
        authority = options.tls_client_ca and options.tls_client_ca.read_bytes()
        pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
        port = server.add_secure_port(address, grpc.ssl_server_credentials([pair], authority, authority is not None))
    else:
        port = server.add_insecure_port(address)
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(port, flush=True)
    await stopping.wait()
    await server.stop(10)


async def serve_grpclib(options: argparse.Namespace, paths: dict[str, Play], services: list[str]) -> None:
    from grpclib.const import Cardinality, Handler, Status
    from grpclib.encoding.base import CodecBase, StatusDetailsCodecBase
    from grpclib.encoding.proto import ProtoCodec
    from grpclib.exceptions import GRPCError
    from grpclib.reflection.service import ServerReflection
    from grpclib.server import Server, Stream

    class Raw(CodecBase):
        """Bytes as they are for the scripted methods; reflection's messages as protobuf."""

        __content_subtype__ = "json" if options.codec == "json" else "proto"

        def encode(self, message: Any, message_type: Any) -> bytes:
            return message if message_type is bytes else ProtoCodec().encode(message, message_type)

        def decode(self, data: bytes, message_type: Any) -> Any:
            return data if message_type is bytes else ProtoCodec().decode(data, message_type)

    class RawDetails(StatusDetailsCodecBase):
        def encode(self, status: Status, message: str | None, details: Any) -> bytes:
            return bytes(details)

        def decode(self, status: Status, message: str | None, data: bytes) -> Any:
            return data

    class Service:
        """All paths of one service."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __mapping__(self) -> dict[str, Handler]:
            prefix = f"/{self._name}/"
            return {
                path: Handler(handle_of(play), Cardinality.UNARY_UNARY, bytes, bytes)
                for path, play in paths.items()
                if path.startswith(prefix)
            }

    def handle_of(play: Play) -> Callable[[Stream[bytes, bytes]], Awaitable[None]]:
        async def handle(stream: Stream[bytes, bytes]) -> None:
            body = await stream.recv_message()
            assert body is not None
            metadata = {key: value for key, value in (stream.metadata or {}).items() if isinstance(value, str)}
            left = stream.deadline.time_remaining() if stream.deadline is not None else None
            try:
                await stream.send_message(await play(body, metadata, left))
            except Refusal as refusal:
                raise GRPCError(Status[refusal.code], refusal.message, refusal.details) from None

        return handle

    handlers: list[Any] = [Service(name) for name in services]
    server = Server(
        ServerReflection.extend(handlers) if options.reflection else handlers,
        codec=Raw(),
        status_details_codec=RawDetails(),
    )
    listener = socket.create_server(("127.0.0.1", options.port))
    tls = None
    if options.tls_cert:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.tls_cert, options.tls_key)
        tls.set_alpn_protocols(["h2"])
        if options.tls_client_ca:
            tls.load_verify_locations(options.tls_client_ca)
            tls.verify_mode = ssl.CERT_REQUIRED
    await server.start(sock=listener, ssl=tls)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(listener.getsockname()[1], flush=True)
    await stopping.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flavour", choices=("grpcio", "grpclib"), required=True)
    parser.add_argument("--codec", choices=("protobuf", "json"), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--descriptor-set", type=Path, required=True)
    parser.add_argument("--reflection", action="store_true")
    parser.add_argument("--max-streams", type=int, default=0)
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--tls-client-ca", type=Path)
    options = parser.parse_args()
    script = Script(options.script, options.journal)
    paths, services = methods_of(script, options.descriptor_set.read_bytes(), options.codec)
    serve = serve_grpcio if options.flavour == "grpcio" else serve_grpclib
    asyncio.run(serve(options, paths, services))


if __name__ == "__main__":
    main()
