"""Which services and methods a participant has, and the messages they take: its catalog.

Read from the participant by server reflection (v1, then v1alpha) or from a descriptor-set file. A catalog is a value:
it is replaced whole, never changed. What is read is untrusted: bounded in size and time, and whatever does not build
is a failed lookup.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from typing import Any

import msgspec
from google.protobuf import (
    any_pb2,
    api_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    source_context_pb2,
    struct_pb2,
    timestamp_pb2,
    type_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpclib.client import Channel, Handler
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.protocol import H2Protocol
from grpclib.reflection.v1 import reflection_grpc as v1_grpc
from grpclib.reflection.v1 import reflection_pb2 as v1
from grpclib.reflection.v1alpha import reflection_grpc as v1alpha_grpc
from grpclib.reflection.v1alpha import reflection_pb2 as v1alpha

from rpc.outcomes import clean_text, closed_after_handshake, failed_before_leaving, not_done

log = logging.getLogger("saga.rpc")

LOOKUP_SECS = 10.0
"""How long a participant may take to describe itself; grpcio and grpclib need milliseconds."""

MAX_DESCRIPTION_BYTES = 64 * 2**20
"""How much a participant may send to describe itself. A guess: a thousand times what a large API needs."""

_PLUMBING = ("grpc.reflection.", "grpc.health.", "grpc.channelz.")
"""Services that are there for operators; not offered in messages, and reflection itself is not looked up."""


class Catalog:
    """The services of one participant and, through `pool`, their messages.

    `services`: by full name; None where the participant names a service it cannot describe.
    """

    def __init__(self, files: dict[str, bytes], names: list[str]) -> None:
        self.files = files
        self.pool = _build_pool(files)
        self.services: dict[str, ServiceDescriptor | None] = {}
        for name in names:
            try:
                self.services[name] = self.pool.FindServiceByName(name)
            except KeyError:
                self.services[name] = None

    def method(self, wanted: str) -> MethodDescriptor:
        """The unary method that `Service.Method` or `pkg.Service.Method` means. Raises `Lost` (not done, permanent)
        with a message that lists what there is."""
        service_name, _, method_name = wanted.rpartition(".")
        matches = [name for name in self.services if name == service_name]
        if not matches and "." not in service_name:
            matches = [name for name in self.services if name.rpartition(".")[2] == service_name]
        if not matches:
            raise self._no_such(f"no service {service_name}")
        if len(matches) > 1:
            raise self._no_such(f"{service_name} is ambiguous: {', '.join(sorted(matches))}; write the full name")
        service = self.services[matches[0]]
        if service is None:
            raise self._no_such(f"the participant does not describe its service {matches[0]}")
        method = service.methods_by_name.get(method_name)
        if method is None:
            raise self._no_such(f"no method {method_name} in {service.full_name}")
        if method.client_streaming or method.server_streaming:
            raise self._no_such(f"{method.full_name} is a streaming method, a step needs a unary one")
        return method

    def _no_such(self, what: str) -> Exception:
        return not_done("UNIMPLEMENTED", clean_text(f"{what}. The participant offers {self._offer()}"), permanent=True)

    def _offer(self) -> str:
        offered = [
            f"{name} ({', '.join(sorted(service.methods_by_name))})" if service is not None else name
            for name, service in sorted(self.services.items())
            if not name.startswith(_PLUMBING)
        ]
        return "; ".join(offered) or "no services"


def _build_pool(files: dict[str, bytes]) -> descriptor_pool.DescriptorPool:
    """All files, each after those it imports. Raises TypeError, ValueError where they do not fit together."""
    pool = descriptor_pool.DescriptorPool()
    started: set[str] = set()
    added: set[str] = set()
    # Depth first without recursion: a chain of imports may be longer than Python's stack.
    stack = [(name, False) for name in files]
    while stack:
        name, imports_added = stack.pop()
        if name in added:
            continue
        if imports_added:
            pool.AddSerializedFile(files[name])
            added.add(name)
            continue
        if name in started:
            raise ValueError(f"{name} imports itself by way of others")
        started.add(name)
        stack.append((name, True))
        stack.extend((item, False) for item in FileDescriptorProto.FromString(files[name]).dependency)
    return pool


def catalog_from_descriptor_set(content: bytes) -> Catalog:
    """From what `protoc --include_imports --descriptor_set_out` writes. Raises ValueError."""
    try:
        described = FileDescriptorSet.FromString(content)
        files = {file.name: file.SerializeToString() for file in described.file}
        files = _WELL_KNOWN | files
        names = [
            f"{file.package}.{service.name}" if file.package else service.name
            for file in described.file
            for service in file.service
        ]
        return Catalog(files, names)
    except Exception as error:
        raise ValueError(f"not a usable descriptor set (written with --include_imports?): {error}") from error


_WELL_KNOWN: dict[str, bytes] = {
    module.DESCRIPTOR.name: module.DESCRIPTOR.serialized_pb
    for module in (
        *(any_pb2, api_pb2, descriptor_pb2, duration_pb2, empty_pb2, field_mask_pb2),
        *(source_context_pb2, struct_pb2, timestamp_pb2, type_pb2, wrappers_pb2),
    )
}
"""The files of `google/protobuf/`, for descriptions that leave them out; they are the same everywhere."""


class _Version(msgspec.Struct, frozen=True):
    name: str
    messages: Any
    stub: Any


_VERSIONS = (
    _Version("v1", v1, v1_grpc.ServerReflectionStub),
    _Version("v1alpha", v1alpha, v1alpha_grpc.ServerReflectionStub),
)


async def catalog_by_reflection(
    host: str, port: int, *, tls: ssl.SSLContext | None = None, server_name: str | None = None
) -> Catalog:
    """Asyncio-flavoured: asks the participant for all it has, on a connection of its own.

    Raises `Lost` (not done): permanent if the participant has no reflection, else worth another try.
    """
    channel = _LookupChannel(
        host, port, ssl=tls, config=Configuration(ssl_target_name_override=server_name or host if tls else None)
    )
    where = f"asking {host}:{port} for its methods"
    try:
        async with asyncio.timeout(LOOKUP_SECS):
            for version in _VERSIONS:
                try:
                    files, names = await _read_all(channel, version)
                except GRPCError as error:
                    if _means_not_offered(error):
                        continue
                    raise
                return Catalog(files, names)
    except Exception as error:
        if tls is not None and isinstance(error, StreamTerminatedError) and channel.silent:
            raise failed_before_leaving(closed_after_handshake(channel.ended_by), where) from error
        raise failed_before_leaving(error, where) from error
    finally:
        channel.close()
    raise not_done(
        "UNIMPLEMENTED",
        f"{host}:{port} has no server reflection: give its service a descriptor_set, or codec: json",
        permanent=True,
    )


def _means_not_offered(error: GRPCError) -> bool:
    if error.status is Status.UNIMPLEMENTED:
        return True
    # A grpclib server's UNIMPLEMENTED has no content-type, which grpclib's client reports as this instead.
    return error.status is Status.UNKNOWN and "content-type" in (error.message or "")


class _NoDescription(Exception):
    """The participant answered a question of ours with an error."""


async def _read_all(channel: Channel, version: _Version) -> tuple[dict[str, bytes], list[str]]:
    files: dict[str, bytes] = {}
    async with version.stub(channel).ServerReflectionInfo.open() as stream:

        async def ask(**question: str) -> Any:
            await stream.send_message(version.messages.ServerReflectionRequest(**question))
            answer = await stream.recv_message()
            if answer is None:
                await stream.recv_trailing_metadata()  # raises the status, if it is one
                raise GRPCError(Status.UNAVAILABLE, "the reflection stream ended early")
            if answer.HasField("error_response"):
                raise _NoDescription(answer.error_response.error_message)
            return answer

        async def fetch(**question: str) -> list[str]:
            """Keeps the files of the answer; returns the names of those they import."""
            imports: list[str] = []
            for content in (await ask(**question)).file_descriptor_response.file_descriptor_proto:
                file = FileDescriptorProto.FromString(content)
                if file.name not in files:
                    files[file.name] = content
                    imports += file.dependency
            return imports

        names = [item.name for item in (await ask(list_services="")).list_services_response.service]
        todo: list[str] = []
        for name in names:
            if not name.startswith("grpc.reflection."):
                with contextlib.suppress(_NoDescription):
                    todo += await fetch(file_containing_symbol=name)
        while todo:
            wanted = todo.pop()
            if wanted in files:
                continue
            try:
                todo += await fetch(file_by_filename=wanted)
            except _NoDescription:
                if wanted not in _WELL_KNOWN:
                    raise
                files[wanted] = _WELL_KNOWN[wanted]
                todo += FileDescriptorProto.FromString(_WELL_KNOWN[wanted]).dependency
        await stream.end()
    return files, names


class _LookupChannel(Channel):
    """A connection that ends itself when the participant sends more than a description can be."""

    protocol: _BoundedProtocol | None = None

    def _protocol_factory(self) -> H2Protocol:
        self.protocol = _BoundedProtocol(Handler(), self._config, self._h2_config)
        return self.protocol

    @property
    def silent(self) -> bool:
        """The participant has sent nothing."""
        return self.protocol is not None and not self.protocol.received

    @property
    def ended_by(self) -> Exception | None:
        """What broke the connection, if it did not simply end."""
        return None if self.protocol is None else self.protocol.ended_by


class _BoundedProtocol(H2Protocol):
    received = 0
    ended_by: Exception | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        self.ended_by = exc if isinstance(exc, Exception) else None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.received > MAX_DESCRIPTION_BYTES:
            self.processor.close(f"the description is over {MAX_DESCRIPTION_BYTES} bytes")
        else:
            super().data_received(data)
