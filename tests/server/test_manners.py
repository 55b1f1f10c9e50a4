"""What a client of HTTP/2 may cost beside what it asks for: answers it does not take, frames that ask for nothing,
heads and messages that do not end. Asked from outside, on both ports."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h2.events
import pytest
import trio
from grpclib.const import Status
from grpclib.server import Handler
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from k1s0.system.saga.v1 import saga_pb2 as pb

from rpc.guarded_h2 import CALLS_AT_ONCE, FRAME_BYTES
from saga.door_limits import DoorLimits
from saga.manners import IDLE_FRAMES
from saga.service import StartSaga
from tests.server.test_hostile_connections import DATA, PING, PRIORITY, SETTINGS, frame
from tests.server.test_limits import DOORS, grpc_error, port_of, rest, until_closed
from tests.support.doors import Doors, open_doors
from tests.web.raw import H2_PREFACE, H2Client, h2_request

HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
SAGA = "/k1s0.system.saga.v1.SagaService/"
PREFIX = struct.Struct(">?I")


def grpc_headers(path: str) -> list[tuple[str, str]]:
    pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "a")]
    return [*pseudo, ("te", "trailers"), ("content-type", "application/grpc")]


def rest_headers(path: str, method: str = "GET") -> list[tuple[str, str]]:
    return [(":method", method), (":scheme", "http"), (":path", path), (":authority", "a")]


def message(body: bytes) -> bytes:
    return PREFIX.pack(False, len(body)) + body


async def client_of(port: int, *, window: int | None = None) -> H2Client:
    """`window`: how much of each answer it lets come."""
    client = H2Client(await trio.open_tcp_stream("127.0.0.1", port))
    if window is not None:
        client.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
    await client.send()
    return client


async def ask(client: H2Client, headers: list[tuple[str, str]], body: bytes | None = None) -> int:
    """Sends a request, whole unless its body is None and its method has one; returns its stream."""
    stream_id: int = client.connection.get_next_available_stream_id()
    client.connection.send_headers(stream_id, headers, end_stream=body is None and dict(headers)[":method"] == "GET")
    if body is not None:
        client.connection.send_data(stream_id, body, end_stream=True)
    await client.send()
    return stream_id


async def until(client: H2Client, wanted: Callable[[h2.events.Event], bool]) -> h2.events.Event:
    with trio.fail_after(20):
        while True:
            for event in await client.events():
                if wanted(event):
                    return event


def was_reset(event: h2.events.Event) -> bool:
    return isinstance(event, h2.events.StreamReset)


async def big_saga(doors: Doors, length: int) -> str:
    started = await doors.house.service.start(StartSaga(workflow_name="order", payload={"text": "x" * length}))
    return started.saga.saga_id


def get_of(door: str, saga_id: str) -> tuple[list[tuple[str, str]], bytes | None]:
    if door == "rest":
        return rest_headers(f"/api/v1/sagas/{saga_id}"), None
    return grpc_headers(SAGA + "GetSaga"), message(pb.GetSagaRequest(saga_id=saga_id).SerializeToString())


# --- answers that are not taken --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(10, 0), (500_000, 0), (500_000, 3000)])
@DOORS
async def test_an_answer_the_window_is_not_opened_for_costs_the_stream(
    tmp_path: Path, door: str, length: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.guarded_h2_protocol.STALLED_SECS", 0.3)
    monkeypatch.setattr("rpc.outbound.ANSWER_SECS", 0.3)
    async with open_doors(tmp_path) as doors:
        saga_id = await big_saga(doors, length)
        client = await client_of(port_of(doors, door), window=window)
        stream_id = await ask(client, *get_of(door, saga_id))
        reset = await until(client, was_reset)
        assert isinstance(reset, h2.events.StreamReset)
        assert reset.stream_id == stream_id
        # The connection goes on: what has no body, or a window, is answered.
        client.connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 65_535})
        headers, body = (
            (rest_headers("/healthz"), None) if door == "rest" else (grpc_headers(HEALTH + "Check"), message(b""))
        )
        with trio.fail_after(20):
            status, _, _ = await client.answer(await ask(client, headers, body))
        assert status == 200
        await client.close()


async def test_a_slow_client_that_takes_its_answer_gets_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.guarded_h2_protocol.STALLED_SECS", 2.0)
    async with open_doors(tmp_path) as doors:
        saga_id = await big_saga(doors, 500_000)
        client = await client_of(doors.rest_port)
        stream_id = await ask(client, *get_of("rest", saga_id))
        with trio.fail_after(60):
            _, headers, body = await client.answer(stream_id)
        assert len(body) == int(headers["content-length"])
        assert json.loads(body)["saga"]["saga_id"] == saga_id
        await client.close()


async def test_a_grpc_answer_goes_out_in_short_frames_to_a_client_that_takes_long_ones(tmp_path: Path) -> None:
    # A frame is given to the transport as a whole, where what waits to be taken is bounded.
    async with open_doors(tmp_path) as doors:
        headers, body = get_of("grpc", await big_saga(doors, 300_000))
        client = await client_of(doors.grpc_port, window=2**24)
        client.connection.increment_flow_control_window(2**24)
        client.connection.update_settings({SettingCodes.MAX_FRAME_SIZE: 2**24 - 1})
        stream_id = await ask(client, headers, body)
        lengths: list[int] = []
        ended = False
        with trio.fail_after(20):
            while not ended:
                for event in await client.events():
                    if isinstance(event, h2.events.DataReceived):
                        lengths.append(len(event.data))
                    ended = ended or (isinstance(event, h2.events.StreamEnded) and event.stream_id == stream_id)
        assert sum(lengths) > 300_000
        assert max(lengths) <= FRAME_BYTES
        await client.close()


async def test_an_http1_client_that_reads_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.guarded_tcp_server.STALLED_SECS", 0.3)
    async with open_doors(tmp_path) as doors:
        saga_id = await big_saga(doors, 1_000_000)
        asking = f"GET /api/v1/sagas/{saga_id} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        async with await trio.open_tcp_stream("127.0.0.1", doors.rest_port) as stream:
            with trio.fail_after(30):
                try:
                    while True:
                        await stream.send_all(asking)
                except trio.BrokenResourceError:
                    pass
        await doors.check()


@DOORS
async def test_answers_that_wait_for_their_clients_have_a_bound_all_together(tmp_path: Path, door: str) -> None:
    async with open_doors(tmp_path, limits=DoorLimits(max_answer_bytes=300_000)) as doors:
        large, small = await big_saga(doors, 400_000), await big_saga(doors, 10)
        port = port_of(doors, door)
        # Larger than all there is, and alone: it goes.
        alone = await client_of(port)
        waiting = await client_of(port, window=0)
        first = await ask(waiting, *get_of(door, large))
        await until(waiting, lambda event: isinstance(event, h2.events.ResponseReceived))
        with trio.fail_after(20):
            if door == "rest":
                status, headers, body = await alone.answer(await ask(alone, *get_of(door, large)))
                assert (status, headers["retry-after"]) == (503, "1")
                assert "too many large answers" in json.loads(body)["error"]["message"]
                assert (await rest(doors, "GET", f"/api/v1/sagas/{small}")).status_code == 200
            else:
                await ask(alone, *get_of(door, large))
                told = await until(alone, lambda event: isinstance(event, h2.events.TrailersReceived))
                assert isinstance(told, h2.events.TrailersReceived)
                trailers = {str(name): str(value) for name, value in told.headers}
                assert trailers["grpc-status"] == str(Status.RESOURCE_EXHAUSTED.value)
                assert trailers["grpc-message"] == "too many large answers at a time; try again"
            waiting.connection.reset_stream(first)
            await waiting.send()
            while True:
                got = await alone.answer(await ask(alone, *get_of(door, large)))
                if len(got[2]) > 400_000:
                    break
        await waiting.close()
        await alone.close()


# --- frames that ask for nothing -------------------------------------------------------------------------------------

FLOODS: dict[str, bytes] = {
    "settings": frame(SETTINGS) * 2000,
    "pings": frame(PING, 0, 0, b"x" * 8) * 2000,
    "priorities": frame(PRIORITY, 0, 1, b"\0\0\0\0\x10") * 2000,
    "frames nobody knows": frame(0x42, 0, 0, b"x") * 2000,
    "empty data": frame(DATA, 0, 1) * 2000,
}


@pytest.mark.parametrize("flood", FLOODS)
@DOORS
async def test_a_flood_of_frames_that_ask_for_nothing_ends_its_connection(
    tmp_path: Path, door: str, flood: str
) -> None:
    async with open_doors(tmp_path) as doors:
        headers = rest_headers("/api/v1/sagas", "POST") if door == "rest" else grpc_headers(SAGA + "StartSaga")
        async with await trio.open_tcp_stream("127.0.0.1", port_of(doors, door)) as stream:
            try:
                await stream.send_all(h2_request(headers, end=False) + FLOODS[flood])
            except trio.BrokenResourceError:
                pass
            await until_closed(stream)
        await doors.check()


@DOORS
async def test_requests_reset_at_once_end_the_connection_and_it_says_why(
    tmp_path: Path, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing comes back, so that the last reset is the one too many, and the server leaves none unread.
    monkeypatch.setattr("saga.manners.IDLE_FRAMES_A_SEC", 0.0)
    monkeypatch.setattr("saga.manners.IDLE_FRAMES_A_REQUEST", 0.0)
    headers = rest_headers("/healthz") if door == "rest" else grpc_headers(HEALTH + "Check")
    async with open_doors(tmp_path) as doors:
        client = await client_of(port_of(doors, door))  # whose settings are one frame
        for _ in range(int(IDLE_FRAMES)):
            stream_id = client.connection.get_next_available_stream_id()
            client.connection.send_headers(stream_id, headers, end_stream=False)
            client.connection.reset_stream(stream_id)
        await client.send()
        told = await until(client, lambda event: isinstance(event, h2.events.ConnectionTerminated))
        assert isinstance(told, h2.events.ConnectionTerminated)
        assert told.error_code == ErrorCodes.ENHANCE_YOUR_CALM
        await client.close()
        await doors.check()


@DOORS
async def test_a_client_that_gives_up_some_of_its_requests_is_borne_with(tmp_path: Path, door: str) -> None:
    headers, body = (
        (rest_headers("/healthz"), None) if door == "rest" else (grpc_headers(HEALTH + "Check"), message(b""))
    )
    async with open_doors(tmp_path) as doors:
        client = await client_of(port_of(doors, door))
        for _ in range(20):
            for _ in range(20):
                stream_id = await ask(client, headers, body)
                client.connection.reset_stream(stream_id)
            client.connection.ping(b"x" * 8)
            await client.send()
            with trio.fail_after(20):
                status, _, _ = await client.answer(await ask(client, headers, body))
            assert status == 200
        await client.close()


# --- what others notice ----------------------------------------------------------------------------------------------

FLOODING, REQUESTS = 20, 90
"""Connections, and what each asks at once: fewer than it may."""

MEANWHILE = 100
"""How many of those may be answered before somebody else: a few turns' worth."""


def lines_of(caplog: pytest.LogCaptureFixture, part: str) -> int:
    return sum(part in record.getMessage() for record in caplog.records)


@DOORS
async def test_a_client_that_is_known_is_answered_before_those_who_ask_much_at_once(
    tmp_path: Path, door: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with open_doors(tmp_path) as doors:
        port = port_of(doors, door)
        asked, part = get_of(door, "known"), "path=/api/v1/sagas/flood" if door == "rest" else "method=ListSagas"
        if door == "rest":
            flood: tuple[list[tuple[str, str]], bytes | None] = rest_headers("/api/v1/sagas/flood"), None
        else:
            flood = grpc_headers(SAGA + "ListSagas"), message(b"")
        known = await client_of(port)
        with trio.fail_after(60):
            await known.answer(await ask(known, *asked))
            streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(FLOODING)]
            flooding = [H2Client(stream) for stream in streams]
            for client in flooding:
                for _ in range(REQUESTS):
                    stream_id = client.connection.get_next_available_stream_id()
                    client.connection.send_headers(stream_id, flood[0], end_stream=flood[1] is None)
                    if flood[1] is not None:
                        client.connection.send_data(stream_id, flood[1], end_stream=True)
            for stream, client in zip(streams, flooding, strict=True):
                # Without a turn for the server between the first and the last.
                os.write(stream.socket.fileno(), client.connection.data_to_send())
            await known.answer(await ask(known, *asked))
            before = lines_of(caplog, part)
            for client in flooding:
                ended = 0
                while ended < REQUESTS:
                    ended += sum(isinstance(event, h2.events.StreamEnded) for event in await client.events())
        assert lines_of(caplog, part) == FLOODING * REQUESTS
        assert before < MEANWHILE
        for client in [known, *flooding]:
            await client.close()


def calls_begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the calls that begin from now on, in their order."""
    begun: list[str] = []
    accept = Handler.accept

    def told(self: Handler, stream: Any, headers: Any, release_stream: Any) -> None:
        begun.append(dict(headers)[":path"])
        accept(self, stream, headers, release_stream)

    monkeypatch.setattr(Handler, "accept", told)
    return begun


async def test_whoever_comes_after_a_client_that_asks_much_at_once_waits_for_a_few_of_its_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = calls_begun(monkeypatch)
    asking = b"".join(frame(1, 5, stream_id, b"\x83\x86\x84") for stream_id in range(1, 181, 2))
    async with open_doors(tmp_path) as doors:
        much, stream = [await trio.open_tcp_stream("127.0.0.1", doors.grpc_port) for _ in range(2)]
        with trio.fail_after(20):
            for arrived in (much, stream):
                assert await arrived.receive_some()
            client = H2Client(stream)
            client.connection.send_headers(1, grpc_headers(SAGA + "GetSaga"))
            client.connection.send_data(1, message(b""), end_stream=True)
            # Without a turn for the server between the two.
            os.write(much.socket.fileno(), H2_PREFACE + asking)
            os.write(stream.socket.fileno(), client.connection.data_to_send())
            await client.answer(1)
            while len(begun) < 91:
                assert await much.receive_some()
        await much.aclose()
        assert begun.index(SAGA + "GetSaga") <= 2 * CALLS_AT_ONCE
        await client.close()


async def test_a_call_that_is_reset_at_once_never_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = calls_begun(monkeypatch)
    async with open_doors(tmp_path) as doors:
        client = await client_of(doors.grpc_port)
        for _ in range(10):
            stream_id = client.connection.get_next_available_stream_id()
            client.connection.send_headers(stream_id, grpc_headers(SAGA + "ListSagas"))
            client.connection.send_data(stream_id, message(b""), end_stream=True)
            client.connection.reset_stream(stream_id)
        with trio.fail_after(20):
            await client.answer(await ask(client, *get_of("grpc", "known")))
        assert begun == [SAGA + "GetSaga"]
        await client.close()


# --- heads and messages that do not end ------------------------------------------------------------------------------

HALF_HEADS = {
    "no end of headers": frame(1, 0, 3, b"\x82"),
    "half a frame of headers": frame(1, 4, 3, b"\x82", length=100),
}


@pytest.mark.parametrize("half", HALF_HEADS)
@DOORS
async def test_a_later_request_whose_head_does_not_end_is_waited_for_as_long_as_the_first(
    tmp_path: Path, door: str, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, body = (
        (rest_headers("/healthz"), None) if door == "rest" else (grpc_headers(HEALTH + "Check"), message(b""))
    )
    async with open_doors(tmp_path) as doors:
        stream = await trio.open_tcp_stream("127.0.0.1", port_of(doors, door))
        client = H2Client(stream)
        with trio.fail_after(20):
            status, _, _ = await client.answer(await ask(client, headers, body))
        assert status == 200
        # Not before: the first head, too, is waited for so long.
        monkeypatch.setattr("web.guarded_h2_protocol.HEAD_SECS", 0.3)
        monkeypatch.setattr("rpc.guarded_h2.HEAD_SECS", 0.3)
        await stream.send_all(HALF_HEADS[half])
        await until_closed(stream)
        await client.close()
        await doors.check()


@DOORS
async def test_a_head_in_pieces_is_ended_when_it_grows_over_what_is_read(tmp_path: Path, door: str) -> None:
    piece = frame(9, 0, 1, b"\x00\x01a\x01b" * 3000)
    async with open_doors(tmp_path) as doors:
        async with await trio.open_tcp_stream("127.0.0.1", port_of(doors, door)) as stream:
            try:
                await stream.send_all(H2_PREFACE + frame(1, 0, 1, b"\x82") + piece * 6)
            except trio.BrokenResourceError:
                pass
            await until_closed(stream)
        await doors.check()


@DOORS
async def test_a_client_that_leaves_takes_its_connection_with_it(tmp_path: Path, door: str) -> None:
    async with open_doors(tmp_path) as doors:
        for begun in (H2_PREFACE, H2_PREFACE + frame(1, 0, 1, b"\x82")):
            async with await trio.open_tcp_stream("127.0.0.1", port_of(doors, door)) as stream:
                await stream.send_all(begun)
                assert await stream.receive_some()
                await stream.send_eof()
                with trio.fail_after(10):  # long before any clock
                    await until_closed(stream)


async def test_frames_may_be_empty_or_padded_in_the_middle_of_a_message(tmp_path: Path) -> None:
    whole = message(
        pb.StartSagaRequest(workflow_name="order", payload=b'{"a": "' + b"x" * 3000 + b'"}').SerializeToString()
    )
    async with open_doors(tmp_path) as doors:
        client = await client_of(doors.grpc_port)
        stream_id = await ask(client, grpc_headers(SAGA + "StartSaga"))
        for start in range(0, len(whole), 50):
            client.connection.send_data(stream_id, b"")
            client.connection.send_data(stream_id, whole[start : start + 50], pad_length=200)
        client.connection.end_stream(stream_id)
        await client.send()
        with trio.fail_after(20):
            _, _, body = await client.answer(stream_id)
        assert pb.StartSagaResponse.FromString(body[PREFIX.size :]).status == "STARTED"
        await client.close()


async def test_many_messages_at_a_time_on_one_connection_do_not_wait_for_each_others_room(tmp_path: Path) -> None:
    payload = b'{"text": "' + b"x" * 60_000 + b'"}'
    whole = message(pb.StartSagaRequest(workflow_name="order", payload=payload).SerializeToString())
    async with open_doors(tmp_path) as doors:
        client = await client_of(doors.grpc_port)
        streams = [await ask(client, grpc_headers(SAGA + "StartSaga")) for _ in range(15)]
        left = dict.fromkeys(streams, whole)
        answered: set[int] = set()
        with trio.fail_after(30):
            # The half of each first, so that all are under way together and hold more than the connection's window.
            for last in (False, True):
                while any(len(data) > (0 if last else 3000) for data in left.values()):
                    sent = False
                    for stream_id, data in left.items():
                        room = min(client.connection.local_flow_control_window(stream_id), 16_000)
                        chunk = data[: min(room, len(data) - (0 if last else 3000))] if len(data) > 0 else b""
                        if chunk:
                            left[stream_id] = data[len(chunk) :]
                            client.connection.send_data(stream_id, chunk, end_stream=not left[stream_id])
                            sent = True
                    await client.send()
                    if not sent:
                        answered |= {
                            event.stream_id
                            for event in await client.events()
                            if isinstance(event, h2.events.StreamEnded)
                        }
            while len(answered) < len(streams):
                answered |= {
                    event.stream_id for event in await client.events() if isinstance(event, h2.events.StreamEnded)
                }
        await client.close()


# --- what is open to anyone ------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[bytes, Status]] = {
    "compressed": (PREFIX.pack(True, 3) + b"abc", Status.UNIMPLEMENTED),
    "no message at all": (b"", Status.INVALID_ARGUMENT),
    "bytes that are no message": (message(b"\xff\xff\xff"), Status.INVALID_ARGUMENT),
    "cut short": (PREFIX.pack(False, 100) + b"abc", Status.INVALID_ARGUMENT),
    "four gigabytes": (PREFIX.pack(False, 0xFFFFFFFF) + b"abc", Status.RESOURCE_EXHAUSTED),
}


@pytest.mark.parametrize("path", [HEALTH + "Check", HEALTH + "Watch", REFLECTION])
async def test_what_a_client_does_wrong_with_health_or_reflection_is_told_to_it_and_is_no_error_of_ours(
    tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_doors(tmp_path) as doors:
        for name, (body, status) in WRONG.items():
            client = await client_of(doors.grpc_port)
            with trio.fail_after(20):
                _, headers, _ = await client.answer(await ask(client, grpc_headers(path), body))
            if path == REFLECTION and not body:
                status = Status.OK  # a stream of none is one
            assert headers.get("grpc-status", "0") == str(status.value), name
            await client.close()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("path", [HEALTH + "Check", HEALTH + "Watch", REFLECTION])
async def test_health_and_reflection_wait_for_a_message_within_bounds(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpc.open_services.BODY_SECS", 0.2)
    async with open_doors(tmp_path) as doors:
        client = await client_of(doors.grpc_port)
        stream_id = await ask(client, grpc_headers(path))
        client.connection.send_data(stream_id, PREFIX.pack(False, 10) + b"a")
        await client.send()
        with trio.fail_after(20):
            _, headers, _ = await client.answer(stream_id)
        assert headers["grpc-message"] == "the message did not arrive within 0.2 s"
        await client.close()


async def test_a_health_answer_that_is_not_taken_costs_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpc.outbound.ANSWER_SECS", 0.2)
    async with open_doors(tmp_path) as doors:
        client = await client_of(doors.grpc_port, window=0)
        await ask(client, grpc_headers(HEALTH + "Check"), message(b""))
        await until(client, was_reset)
        await client.close()


async def test_watches_of_health_take_no_other_calls_places(tmp_path: Path) -> None:
    async with open_doors(tmp_path, limits=DoorLimits(max_requests=2, max_connections=3)) as doors:
        watching = [await client_of(doors.grpc_port) for _ in range(3)]
        for client in watching[:2]:
            stream_id = await ask(client, grpc_headers(HEALTH + "Watch"), message(b""))
            await until(client, lambda event: isinstance(event, h2.events.DataReceived))
        # One more than there may be is refused; other calls are not, and get a watcher's connection.
        with trio.fail_after(20):
            stream_id = await ask(watching[2], grpc_headers(HEALTH + "Watch"), message(b""))
            _, headers, _ = await watching[2].answer(stream_id)
        assert headers["grpc-status"] == str(Status.RESOURCE_EXHAUSTED.value)
        for _ in range(3):
            error = await grpc_error(doors.grpc_port, pb.StartSagaRequest())
            assert error.status is Status.INVALID_ARGUMENT
        for client in watching:
            await client.close()
