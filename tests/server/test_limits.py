"""What a door takes on at a time, and for how long it waits for a client: asked from outside, on both ports."""

from __future__ import annotations

import http.client
import json
import sqlite3
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import GRPCError
from k1s0.system.common.v1.types_pb2 import Pagination
from k1s0.system.saga.v1 import saga_pb2 as pb
from k1s0.system.saga.v1.saga_grpc import SagaServiceStub

from bridge import run_aio
from saga.admission import Admission
from saga.door_limits import DoorLimits
from saga.service import StartSaga
from tests.server.test_hostile_connections import CALL, DATA, GRPC, HEADERS, PING, frame
from tests.support.doors import Doors, open_doors
from tests.support.orchestrator import HANGS, ORDER
from tests.support.server_process import server_process
from tests.web.raw import H2_PREFACE, H2Client

BODY_HEAD = b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
TABLE = Path("/proc/net/tcp")
DOORS = pytest.mark.parametrize("door", ["rest", "grpc"])


def port_of(doors: Doors, door: str) -> int:
    return doors.rest_port if door == "rest" else doors.grpc_port


async def until_closed(stream: trio.SocketStream) -> bytes:
    received = b""
    with trio.fail_after(20):
        try:
            while chunk := await stream.receive_some():
                received += chunk
        except trio.BrokenResourceError:
            pass
    return received


async def grpc_error(port: int, request: pb.StartSagaRequest, metadata: dict[str, str] | None = None) -> GRPCError:
    """How a start is refused."""

    async def ask() -> None:
        async with Channel("127.0.0.1", port, status_details_codec=ProtoStatusDetailsCodec()) as channel:
            await SagaServiceStub(channel).StartSaga(request, timeout=20, metadata=metadata)

    with pytest.raises(GRPCError) as caught:
        await run_aio(ask())
    return caught.value


def details(error: GRPCError) -> dict[type, Any]:
    return {type(detail): detail for detail in error.details or ()}


async def rest(doors: Doors, method: str, path: str, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{doors.rest_port}", timeout=20) as client:
        return await client.request(method, path, **more)


# --- connections -----------------------------------------------------------------------------------------------------


@DOORS
async def test_those_that_only_hold_connections_lose_them_to_those_that_come(tmp_path: Path, door: str) -> None:
    async with open_doors(tmp_path, limits=DoorLimits(max_connections=5)) as doors:
        silent = [await trio.open_tcp_stream("127.0.0.1", port_of(doors, door)) for _ in range(15)]
        for stream in silent[:10]:
            await until_closed(stream)
        await doors.check()
        for stream in silent:
            await trio.aclose_forcefully(stream)


@DOORS
async def test_a_connection_with_a_request_under_way_keeps_its_place_and_those_that_come_are_turned_away(
    tmp_path: Path, door: str
) -> None:
    head = BODY_HEAD[:-2] % 20 + b"Expect: 100-continue\r\n\r\n" if door == "rest" else CALL
    async with open_doors(tmp_path, limits=DoorLimits(max_connections=1)) as doors:
        port = port_of(doors, door)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(head + (b"" if door == "rest" else frame(PING, 0, 0, b"x" * 8)))
            with trio.fail_after(20):
                # Answered when the head has been seen.
                seen = b""
                while not (b"HTTP/1.1 100" in seen or b"\x00\x00\x08\x06\x01" in seen):
                    seen += await stream.receive_some()
            for _ in range(3):
                async with await trio.open_tcp_stream("127.0.0.1", port) as late:
                    await until_closed(late)
            if door == "rest":
                await stream.send_all(b"x" * 20)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")


SLOW = {
    "nothing": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A: ",
    "half a preface": H2_PREFACE[:10],
    "no request after the preface": H2_PREFACE,
    "headers without end": H2_PREFACE + frame(HEADERS, 0, 1, b"\x82"),
}


@DOORS
async def test_a_connection_on_which_no_request_comes_is_closed(
    tmp_path: Path, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.guarded_tcp_server.HEAD_SECS", 0.3)
    monkeypatch.setattr("rpc.guarded_h2.HEAD_SECS", 0.3)

    async def one(port: int, begin: bytes) -> None:
        """Goes on a byte at a time, which is no reason to wait for it any longer."""
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(begin)
            if begin in (SLOW["nothing"], SLOW["half a preface"]) or begin.startswith(H2_PREFACE):
                await until_closed(stream)
                return
            with trio.fail_after(20):
                while True:
                    try:
                        await stream.send_all(b"x")
                        with trio.move_on_after(0.05):
                            if not await stream.receive_some():
                                return
                    except trio.BrokenResourceError:
                        return

    async with open_doors(tmp_path) as doors, trio.open_nursery() as nursery:
        for begin in SLOW.values():
            nursery.start_soon(one, port_of(doors, door), begin)


async def test_a_grpc_connection_without_calls_is_sent_goaway_and_one_with_a_call_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpc.guarded_h2.IDLE_SECS", 0.2)
    async with open_doors(tmp_path) as doors:
        async with await trio.open_tcp_stream("127.0.0.1", doors.grpc_port) as stream:
            await stream.send_all(CALL + frame(DATA, 1, 1, struct.pack(">?I", False, 0)))
            answered = await until_closed(stream)
            assert b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" in answered  # GOAWAY
        async with await trio.open_tcp_stream("127.0.0.1", doors.grpc_port) as stream:
            await stream.send_all(CALL)
            with trio.move_on_after(1.0) as waiting:
                await until_closed(stream)
            assert waiting.cancelled_caught


async def test_a_message_that_does_not_come_is_waited_for_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpc.inbound.BODY_SECS", 0.2)
    monkeypatch.setattr("rpc.guarded_h2.IDLE_SECS", 0.2)
    async with open_doors(tmp_path) as doors:
        for begun in (b"", struct.pack(">?I", False, 10) + b"abc"):
            stream = await trio.open_tcp_stream("127.0.0.1", doors.grpc_port)
            async with stream:
                client = H2Client(stream)
                client.connection.send_headers(1, GRPC)
                if begun:
                    client.connection.send_data(1, begun)
                await client.send()
                with trio.fail_after(20):
                    _, headers, _ = await client.answer(1)
                assert headers["grpc-status"] == str(Status.INVALID_ARGUMENT.value)
                assert headers["grpc-message"] == "the message did not arrive within 0.2 s"


async def test_a_grpc_client_that_reads_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpc.guarded_h2.STALLED_SECS", 0.2)
    async with open_doors(tmp_path) as doors:
        stream = await trio.open_tcp_stream("127.0.0.1", doors.grpc_port)
        pings = frame(PING, 0, 0, b"x" * 8) * 5000
        with trio.fail_after(60):
            try:
                while True:
                    await stream.send_all(pings)
            except trio.BrokenResourceError:
                pass
        await trio.aclose_forcefully(stream)
        await doors.check()


@pytest.mark.skipif(not TABLE.exists(), reason="needs the system's table of connections")
@DOORS
async def test_the_system_asks_after_a_peer_that_has_fallen_silent(tmp_path: Path, door: str) -> None:

    def timer(local: int, remote: int) -> str | None:
        """What the system waits for on a connection; 02: the time to ask."""
        for line in TABLE.read_text().splitlines()[1:]:
            fields = line.split()
            if [int(end.partition(":")[2], 16) for end in fields[1:3]] == [local, remote]:
                return fields[5].partition(":")[0]
        return None

    async with open_doors(tmp_path) as doors:
        port = port_of(doors, door)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            here = stream.socket.getsockname()[1]
            with trio.fail_after(20):
                while timer(port, here) != "02":
                    await trio.lowlevel.checkpoint()


# --- requests --------------------------------------------------------------------------------------------------------


async def test_requests_over_the_limit_are_503_with_retry_after_and_probes_are_answered(tmp_path: Path) -> None:
    async with open_doors(tmp_path, limits=DoorLimits(max_requests=1)) as doors:
        async with await trio.open_tcp_stream("127.0.0.1", doors.rest_port) as stream:
            await stream.send_all(BODY_HEAD % 20)
            with trio.fail_after(20):
                while (answer := await rest(doors, "GET", "/api/v1/workflows")).status_code == 200:
                    pass
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "SYS_SAGA_UNAVAILABLE"
            assert "too many requests" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"] == "1"
            assert (await rest(doors, "GET", "/healthz")).status_code == 200
        with trio.fail_after(20):
            while (await rest(doors, "GET", "/api/v1/workflows")).status_code != 200:
                pass


async def test_calls_over_the_limit_are_resource_exhausted_with_retry_info_and_probes_are_answered(
    tmp_path: Path,
) -> None:
    async with open_doors(tmp_path, limits=DoorLimits(max_requests=1)) as doors:
        stream = await trio.open_tcp_stream("127.0.0.1", doors.grpc_port)
        async with stream:
            await stream.send_all(CALL)
            with trio.fail_after(20):
                while (error := await grpc_error(doors.grpc_port, pb.StartSagaRequest())).status is not (
                    Status.RESOURCE_EXHAUSTED
                ):
                    assert error.status is Status.INVALID_ARGUMENT
            assert error.message == "too many calls at a time; try again"
            told = details(error)
            assert told[ErrorInfo].reason == "SYS_SAGA_UNAVAILABLE"
            assert told[RetryInfo].retry_delay.seconds == 1
            await doors.check()


async def test_large_bodies_over_the_room_for_them_are_refused_at_both_doors(tmp_path: Path) -> None:
    async with open_doors(tmp_path, limits=DoorLimits(max_body_bytes=100_000)) as doors:
        body = {"workflow_name": "order", "payload": {"text": "x" * 200_000}}
        answer = await rest(doors, "POST", "/api/v1/sagas", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "too many large bodies" in answer.json()["error"]["message"]
        request = pb.StartSagaRequest(workflow_name="order", payload=b'{"text": "' + b"x" * 200_000 + b'"}')
        error = await grpc_error(doors.grpc_port, request)
        assert (error.status, error.message) == (
            Status.RESOURCE_EXHAUSTED,
            "too many large bodies at a time; try again",
        )
        body["payload"] = {"text": "x" * 50_000}
        assert (await rest(doors, "POST", "/api/v1/sagas", json=body)).status_code == 201


async def test_more_headers_than_a_request_may_have_are_refused_at_both_doors(tmp_path: Path) -> None:
    many = {f"x-{number}": "y" for number in range(101)}
    async with open_doors(tmp_path) as doors:
        answer = await rest(doors, "GET", "/api/v1/workflows", headers=many)
        assert answer.status_code == 400
        assert [detail["reason"] for detail in answer.json()["error"]["details"]] == ["too_many_headers"]
        error = await grpc_error(doors.grpc_port, pb.StartSagaRequest(), many)
        assert error.status is Status.INVALID_ARGUMENT
        assert [broken.reason for broken in details(error)[BadRequest].field_violations] == ["too_many_headers"]


# --- starts ----------------------------------------------------------------------------------------------------------


async def test_starts_are_turned_away_while_the_store_does_not_keep_up_and_taken_when_it_does(tmp_path: Path) -> None:
    async with open_doors(tmp_path) as doors:
        doors.house.answers["Inventory.Reserve"] = [HANGS]
        running = await doors.house.service.start(StartSaga(workflow_name="order", payload={}))
        admission = doors.house.service._admission = Admission(max_starts=3)
        create, go_on = doors.house.store.create, trio.Event()

        async def slowly(new: Any) -> Any:
            await go_on.wait()
            return await create(new)

        doors.house.store.create = slowly  # type: ignore[method-assign]
        body = {"workflow_name": "order"}
        async with trio.open_nursery() as nursery:
            answers: list[int] = []

            async def start() -> None:
                answers.append((await rest(doors, "POST", "/api/v1/sagas", json=body)).status_code)

            for _ in range(3):
                nursery.start_soon(start)
            with trio.fail_after(20):
                while len(admission) < 3:
                    await trio.lowlevel.checkpoint()
            refused = await rest(doors, "POST", "/api/v1/sagas", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "SYS_SAGA_UNAVAILABLE"
            error = await grpc_error(doors.grpc_port, pb.StartSagaRequest(workflow_name="order"))
            assert error.status is Status.RESOURCE_EXHAUSTED
            assert details(error)[ErrorInfo].reason == "SYS_SAGA_UNAVAILABLE"
            assert details(error)[RetryInfo].retry_delay.seconds == 1
            # What is no start is answered all the while.
            assert (await rest(doors, "GET", "/api/v1/sagas")).json()["pagination"]["total_count"] == 1
            assert (await rest(doors, "POST", f"/api/v1/sagas/{running.saga.saga_id}/cancel")).status_code == 200
            await doors.check()
            assert (await rest(doors, "GET", "/readyz")).status_code == 200
            told = (await rest(doors, "GET", "/metrics")).text
            assert 'saga_starts_refused_total{reason="too_many"} 2.0' in told
            assert 'saga_starts_refused_total{reason="stalled"} 0.0' in told
            go_on.set()
        assert answers == [201, 201, 201]
        assert (await rest(doors, "POST", "/api/v1/sagas", json=body)).status_code == 201
        doors.house.let_go.set()


def test_as_many_starts_as_configured_wait_for_a_store_that_is_held_up_and_the_next_are_turned_away(
    tmp_path: Path,
) -> None:
    config = {
        "saga": {"data_dir": str(tmp_path / "data")},
        "services": {"inventory": {"host": "127.0.0.1", "port": 1}, "payment": {"host": "127.0.0.1", "port": 1}},
    }
    with (
        server_process(tmp_path, config, env={"SAGA__SERVER__LIMITS__MAX_STARTS": "1"}) as server,
        ThreadPoolExecutor(1) as others,
    ):
        server.start()
        server.register(ORDER)
        kept = server.start_saga("order", {})
        body = {"workflow_name": "order"}
        with closing(sqlite3.connect(next((tmp_path / "data").glob("*.sqlite3")), isolation_level=None)) as database:
            database.execute("PRAGMA busy_timeout = 20000")
            database.execute("BEGIN IMMEDIATE")
            waiting = others.submit(server.call, "POST", "/api/v1/sagas", body)
            # One of those that are sent until then may be the one that waits.
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=1)) as client:
                status = 0
                for _ in range(200):
                    try:
                        client.request("POST", "/api/v1/sagas", json.dumps(body), {"Content-Type": "application/json"})
                        answer = client.getresponse()
                        status, told = answer.status, json.loads(answer.read())
                    except TimeoutError:
                        client.close()
                        continue
                    if status == 503:
                        break
                assert (status, answer.headers["Retry-After"]) == (503, "1")
                assert told["error"]["message"].startswith("too many sagas are being started at a time")
            assert server.call("GET", f"/api/v1/sagas/{kept}")[0] == 200
            database.execute("ROLLBACK")
        assert waiting.result(60)[0] in (201, 503)
        give_up_at = time.monotonic() + 30
        while server.call("POST", "/api/v1/sagas", body)[0] != 201:
            assert time.monotonic() < give_up_at


def nested(levels: int) -> dict[str, Any]:
    """An object with so many others in it, one in the other."""
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("path", "body", "status", "field", "reason"),
    [
        ("/api/v1/sagas?page_size=201", None, 400, "page_size", None),
        ("/api/v1/audit?page_size=201", None, 400, "page_size", None),
        ("/api/v1/sagas", {"workflow_name": "n" * 256}, 400, "workflow_name", "length"),
        ("/api/v1/sagas", {"workflow_name": "order", "correlation_id": "c" * 256}, 400, "correlation_id", "length"),
        ("/api/v1/sagas", {"workflow_name": "order", "initiated_by": "i" * 256}, 400, "initiated_by", "length"),
        ("/api/v1/sagas", {"workflow_name": "order", "payload": {"a": "x" * (1 << 20)}}, 413, "payload", "too_large"),
        ("/api/v1/sagas", {"workflow_name": "order", "payload": nested(100)}, 400, "payload", "too_deep"),
        ("/api/v1/sagas?correlation_id=" + "c" * 256, None, 400, "correlation_id", None),
        ("/api/v1/workflows", {"workflow_yaml": "x" * (256 * 1024 + 1)}, 400, "", "too_large"),
        ("/api/v1/workflows", {"workflow_yaml": "a: " + "[" * 65}, 400, None, "too_deep"),
        ("/api/v1/workflows", {"workflow_yaml": "name: n\nsteps:" + "\n- {}" * 1001}, 400, "steps", "range"),
        ("/api/v1/workflows", {"workflow_yaml": f"name: {'n' * 256}\nsteps: [{{}}]"}, 400, "name", None),
        ("/api/v1/workflows", {"workflow_yaml": f"steps: [{{name: {'n' * 256}}}]"}, 400, "steps[0].name", None),
    ],
)
async def test_what_is_over_a_limit_is_refused_by_the_name_of_its_field(
    tmp_path: Path, path: str, body: Any, status: int, field: str | None, reason: str | None
) -> None:
    async with open_doors(tmp_path) as doors:
        answer = await rest(doors, "GET" if body is None else "POST", path, json=body)
    assert answer.status_code == status
    found = {(detail["field"], detail["reason"]) for detail in answer.json()["error"]["details"]}
    assert any(field in (None, where) and reason in (None, why) for where, why in found), found


def yaml_of(text: str) -> pb.RegisterWorkflowRequest:
    return pb.RegisterWorkflowRequest(workflow_yaml=text)


@pytest.mark.parametrize(
    ("request_", "metadata", "field", "reason"),
    [
        (pb.ListSagasRequest(pagination=Pagination(page_size=201)), None, "page_size", None),
        (pb.ListSagasRequest(correlation_id="c" * 256), None, "correlation_id", "length"),
        (pb.ListAuditRequest(page_size=201), None, "page_size", None),
        (pb.StartSagaRequest(workflow_name="n" * 256), None, "workflow_name", "length"),
        (pb.StartSagaRequest(workflow_name="order", correlation_id="c" * 256), None, "correlation_id", "length"),
        (pb.StartSagaRequest(workflow_name="order", initiated_by="i" * 256), None, "initiated_by", "length"),
        (pb.StartSagaRequest(workflow_name="order"), "k" * 256, "Idempotency-Key", "length"),
        (
            pb.StartSagaRequest(workflow_name="order", payload=json.dumps(nested(100)).encode()),
            None,
            "payload",
            "too_deep",
        ),
        (
            pb.StartSagaRequest(workflow_name="order", payload=b'{"a": "' + b"x" * (1 << 20) + b'"}'),
            None,
            "payload",
            "too_large",
        ),
        (yaml_of("x" * (256 * 1024 + 1)), None, "", "too_large"),
        (yaml_of("a: " + "[" * 65), None, None, "too_deep"),
        (yaml_of("name: n\nsteps:" + "\n- {}" * 1001), None, "steps", "range"),
        (yaml_of(f"name: {'n' * 256}\nsteps: [{{}}]"), None, "name", None),
        (yaml_of(f"steps: [{{name: {'n' * 256}}}]"), None, "steps[0].name", None),
    ],
)
async def test_what_is_over_a_limit_is_refused_by_the_name_of_its_field_over_grpc(
    tmp_path: Path, request_: Message, metadata: str | None, field: str | None, reason: str | None
) -> None:
    method = type(request_).DESCRIPTOR.name.removesuffix("Request")

    async def ask() -> None:
        async with Channel("127.0.0.1", doors.grpc_port, status_details_codec=ProtoStatusDetailsCodec()) as channel:
            call = getattr(SagaServiceStub(channel), method)
            await call(request_, timeout=20, metadata=None if metadata is None else {"idempotency-key": metadata})

    async with open_doors(tmp_path) as doors:
        with pytest.raises(GRPCError) as caught:
            await run_aio(ask())
    too_large = field == "payload" and reason == "too_large"
    assert caught.value.status is (Status.RESOURCE_EXHAUSTED if too_large else Status.INVALID_ARGUMENT)
    found = {(broken.field, broken.reason) for broken in details(caught.value)[BadRequest].field_violations}
    assert any(field in (None, where) and reason in (None, why) for where, why in found), found


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_an_idempotency_key_out_of_bounds_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    async with open_doors(tmp_path) as doors:
        answer = await rest(
            doors, "POST", "/api/v1/sagas", json={"workflow_name": "order"}, headers={"Idempotency-Key": key}
        )
    assert answer.status_code == 400
    told = [(detail["field"], detail["reason"]) for detail in answer.json()["error"]["details"]]
    assert told == [("Idempotency-Key", "length")]
