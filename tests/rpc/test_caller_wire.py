"""Answers no gRPC library would give: whatever comes over the wire becomes an `Answer`, and the caller lives on."""

from __future__ import annotations

import socket

import pytest
import trio
from h2.errors import ErrorCodes
from hyperframe.frame import GoAwayFrame

from rpc.settings import ServiceSettings
from saga.ports import Answer, Outcome
from tests.rpc.calling import calling, step
from tests.support.http2_peer import GRPC_HEADERS, Http2Peer, http2_peer, message

OK = [("grpc-status", "0")]


async def answer_of(answer: object, timeout_secs: float = 10.0) -> Answer:
    """What one call of a peer that answers so comes to."""
    async with http2_peer(answer) as port:  # type: ignore[arg-type]  # closures of the tests
        settings = ServiceSettings(host="127.0.0.1", port=port, codec="json")
        async with calling({"shop": settings}, max_payload_bytes=1000) as caller:
            with trio.fail_after(timeout_secs + 5):
                return await caller.call(step(timeout_secs=timeout_secs))


def replying(headers: list[tuple[str, str]], body: bytes | None, trailers: list[tuple[str, str]] | None) -> object:
    async def answer(peer: Http2Peer, stream_id: int) -> None:
        peer.h2.send_headers(stream_id, headers, end_stream=body is None and trailers is None)
        if body is not None:
            peer.h2.send_data(stream_id, body, end_stream=trailers is None)
        if trailers is not None:
            peer.h2.send_headers(stream_id, trailers, end_stream=True)

    return answer


async def test_a_plain_answer_is_done() -> None:
    assert await answer_of(replying(GRPC_HEADERS, message(b'{"a":1}'), OK)) == Answer(
        outcome=Outcome.DONE, response={"a": 1}
    )


@pytest.mark.parametrize(
    ("headers", "body", "trailers", "code", "outcome"),
    [
        pytest.param(GRPC_HEADERS, message(b"{}"), None, "UNKNOWN", Outcome.UNKNOWN, id="no-status"),
        pytest.param(GRPC_HEADERS, None, OK, "INTERNAL", Outcome.UNKNOWN, id="ok-without-message"),
        pytest.param(GRPC_HEADERS, None, [("grpc-status", "42")], "UNKNOWN", Outcome.UNKNOWN, id="undefined-status"),
        pytest.param(GRPC_HEADERS, None, [("grpc-status", "x" * 9)], "UNKNOWN", Outcome.UNKNOWN, id="no-number"),
        pytest.param([(":status", "503")], None, None, "UNAVAILABLE", Outcome.UNKNOWN, id="http-503"),
        pytest.param([(":status", "404")], None, None, "UNIMPLEMENTED", Outcome.REFUSED, id="http-404"),
        pytest.param([(":status", "418")], b"teapot", None, "INTERNAL", Outcome.UNKNOWN, id="http-418-with-page"),
        pytest.param([(":status", "200"), ("grpc-status", "9")], None, None, "FAILED_PRECONDITION", Outcome.REFUSED),
        pytest.param(
            [(":status", "415"), ("grpc-status", "3")], None, None, "INVALID_ARGUMENT", Outcome.REFUSED, id="both"
        ),
        pytest.param(GRPC_HEADERS, b"\x01\x00\x00\x00\x01x", OK, "INTERNAL", Outcome.UNKNOWN, id="compressed"),
        pytest.param(GRPC_HEADERS, b"\x00\x00\x00\x00\x09x", OK, "INTERNAL", Outcome.UNKNOWN, id="cut-off"),
        pytest.param(GRPC_HEADERS, b"\x00\x00", OK, "INTERNAL", Outcome.UNKNOWN, id="cut-off-length"),
        pytest.param(GRPC_HEADERS, message(b"{}") * 2, OK, "INTERNAL", Outcome.UNKNOWN, id="two-messages"),
        pytest.param(GRPC_HEADERS, message(b"{"), OK, "INTERNAL", Outcome.UNKNOWN, id="bad-json"),
        pytest.param(
            GRPC_HEADERS, b"\x00\x40\x00\x00\x00{", OK, "RESOURCE_EXHAUSTED", Outcome.UNKNOWN, id="one-gibibyte"
        ),
    ],
)
async def test_malformed_answers_are_told(
    headers: list[tuple[str, str]],
    body: bytes | None,
    trailers: list[tuple[str, str]] | None,
    code: str,
    outcome: Outcome,
) -> None:
    answer = await answer_of(replying(headers, body, trailers))
    assert (answer.outcome, answer.code) == (outcome, code)
    assert answer.message


MANY = [(f"x-{number}", "y" * 50) for number in range(2000)]


@pytest.mark.parametrize(
    ("headers", "body", "trailers"),
    [
        pytest.param([*GRPC_HEADERS, *MANY], message(b"{}"), OK, id="two-thousand-headers"),
        pytest.param(GRPC_HEADERS, message(b"{}"), [*OK, *MANY], id="two-thousand-trailers"),
        pytest.param(GRPC_HEADERS, None, [("grpc-status", "9"), ("grpc-message", "x" * 100_000)], id="long-message"),
        pytest.param(GRPC_HEADERS, message(b'{"a":' * 101 + b"1" + b"}" * 101), OK, id="too-deep"),
    ],
)
async def test_an_answer_over_a_limit_is_told_and_kept_nowhere(
    headers: list[tuple[str, str]], body: bytes | None, trailers: list[tuple[str, str]]
) -> None:
    answer = await answer_of(replying(headers, body, trailers))
    assert (answer.outcome, answer.response) == (Outcome.UNKNOWN, None)
    assert 0 < len(answer.message or "") < 500


async def test_a_participant_that_asks_without_end_and_reads_nothing_loses_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hold_little(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    # What the system holds for a peer that does not read would take long to fill.
    monkeypatch.setattr("rpc.http2._watch_with_tcp", hold_little)
    monkeypatch.setattr("rpc.http2.UNSENT_BYTES", 50_000)

    async def answer(peer: Http2Peer, stream_id: int) -> None:
        peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while True:
            await peer.send(b"\x00\x00\x08\x06\x00\x00\x00\x00\x00ping-me!" * 1000)

    told = await answer_of(answer, timeout_secs=60)
    assert (told.outcome, told.code) == (Outcome.UNKNOWN, "UNAVAILABLE")
    assert "does not read" in told.message


@pytest.mark.parametrize("begun", ["headers", "message"])
async def test_an_answer_that_does_not_end_is_waited_for_as_long_as_the_step_may_take(begun: str) -> None:
    async def answer(peer: Http2Peer, stream_id: int) -> None:
        if begun == "headers":
            await peer.send(b"\x00\x10\x00\x01\x04" + stream_id.to_bytes(4, "big") + b"\x88")
        else:
            peer.h2.send_headers(stream_id, GRPC_HEADERS)
            peer.h2.send_data(stream_id, message(b"x" * 900)[:100])
            await peer.send()
        await trio.sleep_forever()

    told = await answer_of(answer, timeout_secs=0.5)
    assert (told.outcome, told.code) == (Outcome.UNKNOWN, "DEADLINE_EXCEEDED")


async def test_an_answer_without_bytes_is_an_empty_object() -> None:
    answer = await answer_of(replying(GRPC_HEADERS, message(b""), OK))
    assert (answer.outcome, answer.response) == (Outcome.DONE, {})


async def test_error_details_that_cannot_be_read_ask_for_nothing() -> None:
    for details in ("%%%", "AAAA", "ü", "a" * 101):
        trailers = [("grpc-status", "14"), ("grpc-message", "%zz%FF"), ("grpc-status-details-bin", details)]
        answer = await answer_of(replying(GRPC_HEADERS, None, trailers))
        assert (answer.code, answer.retry_after_secs) == ("UNAVAILABLE", None)


async def test_headers_that_are_not_ascii_break_nothing() -> None:
    headers = [*GRPC_HEADERS, ("x-name", "Bestätigt ✓")]
    assert (await answer_of(replying(headers, message(b"{}"), OK))).outcome is Outcome.DONE


async def test_frames_of_unknown_types_and_early_hints_are_ignored() -> None:
    async def answer(peer: Http2Peer, stream_id: int) -> None:
        await peer.send(b"\x00\x00\x02\xbb\x00\x00\x00\x00\x00hi")
        peer.h2.send_headers(stream_id, [(":status", "103")])
        peer.h2.send_headers(stream_id, GRPC_HEADERS)
        peer.h2.send_data(stream_id, message(b"{}"))
        peer.h2.send_headers(stream_id, OK, end_stream=True)

    assert (await answer_of(answer)).outcome is Outcome.DONE


@pytest.mark.parametrize("code", list(ErrorCodes))
async def test_every_reset_is_told(code: ErrorCodes) -> None:
    async def answer(peer: Http2Peer, stream_id: int) -> None:
        peer.h2.reset_stream(stream_id, code)

    told = await answer_of(answer)
    if code is ErrorCodes.REFUSED_STREAM:
        assert (told.outcome, told.code) == (Outcome.NOT_DONE, "UNAVAILABLE")
    else:
        assert told.outcome is Outcome.UNKNOWN
    assert code.name in told.message


async def test_an_answer_that_is_whole_counts_although_a_reset_follows() -> None:
    async def answer(peer: Http2Peer, stream_id: int) -> None:
        peer.h2.send_headers(stream_id, GRPC_HEADERS)
        peer.h2.send_data(stream_id, message(b"{}"))
        peer.h2.send_headers(stream_id, OK, end_stream=True)
        await peer.send(b"\x00\x00\x04\x03\x00" + stream_id.to_bytes(4, "big") + b"\x00\x00\x00\x00")

    assert (await answer_of(answer)).outcome is Outcome.DONE


async def test_garbage_instead_of_http2_leaves_it_in_doubt_and_ends_that_connection_only() -> None:
    async def answer(peer: Http2Peer, stream_id: int) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)

    told = await answer_of(answer)
    assert (told.outcome, told.code) == (Outcome.UNKNOWN, "UNAVAILABLE")


async def test_a_peer_that_speaks_something_else_is_not_called() -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"220 mail.example ESMTP\r\n" * 20)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, greet, 0)
        port = listeners[0].socket.getsockname()[1]
        async with calling({"shop": ServiceSettings(host="127.0.0.1", port=port, codec="json")}) as caller:
            told = await caller.call(step())
        nursery.cancel_scope.cancel()
    assert (told.outcome, told.code) == (Outcome.NOT_DONE, "UNAVAILABLE")


async def test_going_away_lets_taken_calls_finish_and_sends_the_others_elsewhere() -> None:
    first_taken, finish = trio.Event(), trio.Event()
    peers: list[Http2Peer] = []

    async def answer(peer: Http2Peer, stream_id: int) -> None:
        if peer is peers[0] and stream_id == 1:
            first_taken.set()
            await finish.wait()
        elif peer is peers[0]:
            frame = GoAwayFrame(0, last_stream_id=1, error_code=0)
            await peer.send(frame.serialize())
            return
        number = peers.index(peer)
        peer.h2.send_headers(stream_id, GRPC_HEADERS)
        peer.h2.send_data(stream_id, message(b'{"connection":%d}' % number))
        peer.h2.send_headers(stream_id, OK, end_stream=True)

    answers: dict[str, Answer] = {}

    async def one(name: str) -> None:
        answers[name] = await caller.call(step())

    async with http2_peer(answer, peers) as port:
        settings = ServiceSettings(host="127.0.0.1", port=port, codec="json")
        async with calling({"shop": settings}) as caller, trio.open_nursery() as nursery:
            nursery.start_soon(one, "taken")
            await first_taken.wait()
            await one("not taken")
            finish.set()
    assert answers["not taken"].response == {"connection": 1}
    assert answers["taken"].response == {"connection": 0}


async def test_a_large_answer_is_given_up_while_it_comes_in() -> None:
    peers: list[Http2Peer] = []

    async def answer(peer: Http2Peer, stream_id: int) -> None:
        peer.h2.send_headers(stream_id, GRPC_HEADERS)
        await peer.send(b"")
        peer.h2.send_data(stream_id, b"\x00" + (2**30).to_bytes(4, "big") + b"x" * 1000)

    async with http2_peer(answer, peers) as port:
        settings = ServiceSettings(host="127.0.0.1", port=port, codec="json")
        async with calling({"shop": settings}, max_payload_bytes=1000) as caller:
            told = await caller.call(step())
            assert (told.outcome, told.code, told.permanent) == (Outcome.UNKNOWN, "RESOURCE_EXHAUSTED", True)
            assert "1073741824" in told.message
            assert "1000" in told.message
            with trio.fail_after(5):
                while not peers[0].resets:
                    await trio.testing.wait_all_tasks_blocked(0.01)
    assert peers[0].resets == [(1, int(ErrorCodes.CANCEL))]
