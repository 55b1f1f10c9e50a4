"""What holds at the gRPC door whatever is asked: drains, ids of requests, bounds, bytes that are no call, health."""

from __future__ import annotations

import json
import logging
import struct
from typing import Any

import pytest
import trio
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import GRPCError
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpclib.reflection.v1.reflection_grpc import ServerReflectionStub
from grpclib.reflection.v1.reflection_pb2 import ServerReflectionRequest
from grpclib.reflection.v1alpha.reflection_grpc import ServerReflectionStub as AlphaReflectionStub
from grpclib.reflection.v1alpha.reflection_pb2 import ServerReflectionRequest as AlphaReflectionRequest
from k1s0.system.saga.v1 import saga_pb2 as pb

from bridge import run_aio
from rpc.server import MESSAGE_SLACK_BYTES
from saga.errors import Unavailable
from tests.rpc.conftest import NO_SAGA, Door, fields, open_door, reason
from tests.support.orchestrator import HANGS


async def test_a_drain_ends_watches_with_unavailable_and_long_reads_with_the_state_of_now(door: Door) -> None:
    door.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await door.start()
    watched = trio.Event()
    outcomes: list[Any] = []

    async def watch() -> None:
        try:
            async with door.stub.WatchSaga.open(timeout=10) as stream:
                await stream.send_message(pb.WatchSagaRequest(saga_id=saga_id), end=True)
                async for _ in stream:
                    watched.set()
        except GRPCError as error:
            outcomes.append(error)

    async def read() -> None:
        outcomes.append(await door.ended(saga_id))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_aio, watch())
        nursery.start_soon(read)
        await watched.wait()
        while len(door.house.service._watchers) < 2:
            await trio.lowlevel.checkpoint()
        door.house.drain.begin()
        await door.front.drain(5)
    (error,) = [outcome for outcome in outcomes if isinstance(outcome, GRPCError)]
    assert (error.status, reason(error)) == (Status.UNAVAILABLE, "SYS_SAGA_UNAVAILABLE")
    (detail,) = [outcome for outcome in outcomes if isinstance(outcome, pb.GetSagaResponse)]
    assert detail.saga.status == "RUNNING"


async def test_the_request_id_is_echoed_with_an_answer_and_with_an_error(door: Door) -> None:
    async def metadata_of(request: pb.GetSagaRequest, sent: dict[str, str]) -> tuple[Any, Any]:
        async with door.stub.GetSaga.open(timeout=10, metadata=sent) as stream:
            await stream.send_message(request, end=True)
            try:
                await stream.recv_message()
                await stream.recv_trailing_metadata()
            except GRPCError:
                pass
            return stream.initial_metadata or {}, stream.trailing_metadata or {}

    saga_id = await door.start()
    initial, _ = await run_aio(metadata_of(pb.GetSagaRequest(saga_id=saga_id), {"x-request-id": "r-1"}))
    assert initial["x-request-id"] == "r-1"
    initial, trailing = await run_aio(metadata_of(pb.GetSagaRequest(saga_id=NO_SAGA), {"x-request-id": "r-2"}))
    assert "r-2" in (trailing.get("x-request-id"), initial.get("x-request-id"))
    initial, _ = await run_aio(metadata_of(pb.GetSagaRequest(saga_id=saga_id), {"x-request-id": "x" * 129}))
    assert len(initial["x-request-id"]) == 36


async def test_an_absent_store_is_unavailable(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("the database cannot be reached", "10.1.2.3:5432 refused")

    monkeypatch.setattr(door.house.store, "get", away)
    error = await door.refused(door.stub.GetSaga, pb.GetSagaRequest(saga_id=NO_SAGA))
    assert (error.status, reason(error)) == (Status.UNAVAILABLE, "SYS_SAGA_UNAVAILABLE")
    assert error.message == "the database cannot be reached"


async def test_our_own_bug_is_internal_tells_nothing_and_is_logged_with_the_request_id(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret of the inside")

    monkeypatch.setattr(door.house.store, "get", broken)
    with caplog.at_level(logging.ERROR):
        error = await door.refused(
            door.stub.GetSaga, pb.GetSagaRequest(saga_id=NO_SAGA), metadata={"x-request-id": "r-7"}
        )
    assert (error.status, reason(error), error.message) == (
        Status.INTERNAL,
        "SYS_SAGA_INTERNAL_ERROR",
        "internal error",
    )
    assert "secret" not in str(error.details)
    assert "r-7" in caplog.text
    assert "secret of the inside" in caplog.text


async def test_a_payload_over_the_limit_is_resource_exhausted() -> None:
    async with open_door(max_payload_bytes=1000) as door:
        payload = json.dumps({"a": "x" * 1000}).encode()
        error = await door.refused(door.stub.StartSaga, pb.StartSagaRequest(workflow_name="order", payload=payload))
        assert (error.status, reason(error)) == (Status.RESOURCE_EXHAUSTED, "SYS_SAGA_PAYLOAD_TOO_LARGE")
        assert fields(error) == ["payload"]


async def test_a_message_over_the_limit_is_refused_before_it_is_read_and_the_server_goes_on(door: Door) -> None:
    payload = b"x" * ((1 << 20) + MESSAGE_SLACK_BYTES)

    error = await door.refused(door.stub.StartSaga, pb.StartSagaRequest(workflow_name="order", payload=payload))
    assert (error.status, reason(error)) == (Status.RESOURCE_EXHAUSTED, "SYS_SAGA_PAYLOAD_TOO_LARGE")
    assert await door.start()


class _Bytes(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> Any:
        return data


async def raw_call(door: Door, data: bytes) -> Any:
    channel = Channel("127.0.0.1", door.front.port, codec=_Bytes(), status_details_codec=ProtoStatusDetailsCodec())
    method: Any = UnaryUnaryMethod(channel, "/k1s0.system.saga.v1.SagaService/StartSaga", bytes, bytes)
    try:
        return await door.ask(method, data)
    finally:
        channel.close()


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\xff", b"\x0a\x02\xff\xfe", b"\x07", b"hello"])
async def test_bytes_that_are_no_message_are_an_invalid_argument_and_the_server_goes_on(
    door: Door, data: bytes
) -> None:
    with pytest.raises(GRPCError) as caught:
        await raw_call(door, data)
    assert (caught.value.status, reason(caught.value)) == (Status.INVALID_ARGUMENT, "SYS_SAGA_VALIDATION_ERROR")
    assert await door.start()


HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/k1s0.system.saga.v1.SagaService/StartSaga"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", Status.INVALID_ARGUMENT),
        (b"\x00\x00", Status.INVALID_ARGUMENT),
        (b"\x00\x00\x00\x00\x09abc", Status.INVALID_ARGUMENT),
        (b"\x01\x00\x00\x00\x00", Status.UNIMPLEMENTED),
        (b"\x00" + struct.pack(">I", 0xFFFFFFFF), Status.RESOURCE_EXHAUSTED),
    ],
    ids=["no message", "half a prefix", "cut short", "compressed", "4 GiB announced"],
)
async def test_broken_framing_has_a_status_and_the_server_goes_on(door: Door, body: bytes, status: Status) -> None:
    async def send() -> Status:
        connection = await door.channel.__connect__()
        stream = connection.processor.connection.create_stream()
        release = await stream.send_request(HEADERS, _processor=connection.processor)
        try:
            await stream.send_data(body, end_stream=True) if body else await stream.end()
            return Status(int(dict(await stream.recv_headers())["grpc-status"]))
        finally:
            release()

    with trio.fail_after(5):
        assert await run_aio(send()) is status
    assert await door.start()


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\xff" * 200,
        PREFACE + b"\xff" * 100,
        PREFACE + b"\x00\x00\x04\x42\x00\x00\x00\x00\x00abcd",
        PREFACE + b"\x00\x00\x03\x00\x00\x00\x00\x00\x05abc",
        PREFACE + b"\x00\x00\x03\x01\x04\x00\x00\x00\x01\xff\xff\xff",
        PREFACE + b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x00",
    ],
    ids=[
        "http/1.1",
        "noise",
        "noise after the preface",
        "unknown frame",
        "data on idle",
        "bad headers",
        "reset of idle",
    ],
)
async def test_what_is_no_grpc_at_all_leaves_the_server_alive(
    door: Door, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", door.front.port)
    async with stream:
        await stream.send_all(data)
        with trio.move_on_after(0.2):
            await stream.receive_some()
    assert await door.start()


async def test_an_unknown_method_is_unimplemented(door: Door) -> None:
    async def send() -> Status:
        connection = await door.channel.__connect__()
        stream = connection.processor.connection.create_stream()
        headers = [
            (":path", "/k1s0.system.saga.v1.SagaService/Nope") if name == ":path" else (name, value)
            for name, value in HEADERS
        ]
        release = await stream.send_request(headers, end_stream=True, _processor=connection.processor)
        try:
            return Status(int(dict(await stream.recv_headers())["grpc-status"]))
        finally:
            release()

    assert await run_aio(send()) is Status.UNIMPLEMENTED


async def test_health_is_serving_by_name_and_overall_and_not_serving_once_the_drain_began(door: Door) -> None:
    health = HealthStub(door.channel)
    for name in ("", "k1s0.system.saga.v1.SagaService"):
        answer = await door.ask(health.Check, HealthCheckRequest(service=name))
        assert answer.status == HealthCheckResponse.SERVING
    error = await door.refused(health.Check, HealthCheckRequest(service="nope"))
    assert error.status is Status.NOT_FOUND


async def test_health_is_not_serving_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpc.server.HEALTH_KEPT_SECS", 0.0)
    async with open_door() as door:

        async def away() -> None:
            raise Unavailable("database cannot be reached")

        monkeypatch.setattr(door.house.store, "ping", away)
        answer = await door.ask(HealthStub(door.channel).Check, HealthCheckRequest())
        assert answer.status == HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services_in_v1_and_v1alpha(door: Door) -> None:
    asked: list[tuple[Any, Any]] = [
        (ServerReflectionStub(door.channel), ServerReflectionRequest(list_services="")),
        (AlphaReflectionStub(door.channel), AlphaReflectionRequest(list_services="")),
    ]
    for stub, request in asked:
        (answer,) = await door.ask(stub.ServerReflectionInfo, [request])
        names = {service.name for service in answer.list_services_response.service}
        assert {"k1s0.system.saga.v1.SagaService", "grpc.health.v1.Health"} <= names


async def test_calls_are_counted_by_method_and_code(door: Door) -> None:
    await door.start()
    await door.refused(door.stub.GetSaga, pb.GetSagaRequest(saga_id=NO_SAGA))
    text = door.meter.render().decode()
    assert 'saga_grpc_calls_total{code="OK",method="StartSaga"} 1.0' in text
    assert 'saga_grpc_calls_total{code="NOT_FOUND",method="GetSaga"} 1.0' in text
