"""What no honest client sends, on both ports, with and without TLS: it costs the one connection it comes on, at most.

All inputs of a test are sent at the same time, each on a connection of its own, while honest clients go on asking.
"""

from __future__ import annotations

import gzip
import logging
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from shutil import which

import pytest
import trio

import rpc.handshakes
import web.handshakes
from tests.support.doors import Doors, open_doors
from tests.web.raw import H2_PREFACE, h2_request
from tests.web.test_bad_requests import HOSTILE

QUIET_SECS = 0.5
"""How long a connection may say nothing before its input counts as taken."""

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 0x1, 0x4


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """One frame; `length` is what it says of itself, if that is not the truth."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream_id) + payload


GRPC = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/k1s0.system.saga.v1.SagaService/GetSaga"),
    (":authority", "a"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
CALL = h2_request(GRPC, end=False)


def message(body: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """A gRPC message in one DATA frame that ends its stream."""
    size = len(body) if length is None else length
    return frame(DATA, END_STREAM, 1, struct.pack(">?I", flag, size) + body)


def changed(name: str, value: str | None) -> bytes:
    """The call with another value of one header, or without it."""
    headers = [(key, value if key == name else old) for key, old in GRPC]
    return h2_request([(key, text) for key, text in headers if text is not None])


BOMB = gzip.compress(b"\0" * 10_000_000)
FILL = b"\x40\x01x\x7f\xa1\x1e" + b"y" * 4000
"""A header of 4,000 bytes, put into the table that HPACK keeps."""

HTTP2: dict[str, Sequence[bytes]] = {
    "a window over 2^31 by settings": [
        CALL + frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\0\0") + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0x7FFFFFFF))
    ],
    "windows widened by one": [CALL + frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 5000],
    "empty data": [CALL + frame(DATA, 0, 1) * 2000],
    "data that is padding": [CALL + frame(DATA, 0x8, 1, b"\xff" + b"\0" * 255) * 1200],
    "data a byte at a time": [CALL + frame(DATA, 0, 1, b"\0") * 5000],
    "empty continuations": [H2_PREFACE + frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1) * 1000],
    "half of the headers": [H2_PREFACE + frame(HEADERS, 0, 1, b"\x82")],
    "a header of 64 MB in 20 kB": [
        H2_PREFACE + frame(HEADERS, 0, 1, FILL) + frame(CONTINUATION, END_HEADERS, 1, b"\xbe" * 16_000)
    ],
    "a table of 4 GB by settings": [
        H2_PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 1, 0xFFFFFFFF)) + CALL[len(H2_PREFACE) :]
    ],
    "frames of 16 MB by settings": [
        H2_PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 0xFFFFFF)) + CALL[len(H2_PREFACE) :]
    ],
    "answers to settings nobody sent": [H2_PREFACE + frame(SETTINGS, 1) * 2000],
    "answers to pings nobody sent": [H2_PREFACE + frame(PING, 1, 0, b"x" * 8) * 2000],
    "priorities of two thousand streams": [
        H2_PREFACE + b"".join(frame(PRIORITY, 0, number, b"\0\0\0\0\x10") for number in range(1, 4001, 2))
    ],
    "a long chain of priorities": [
        H2_PREFACE
        + b"".join(
            frame(PRIORITY, 0, number, (number - 2).to_bytes(4, "big") + b"\xff") for number in range(3, 1801, 2)
        )
    ],
    "frames nobody knows": [H2_PREFACE + frame(0x42, 0, 0, b"x" * 10) * 2000],
    "a stream below the last": [
        H2_PREFACE + frame(HEADERS, END_HEADERS, 9, b"\x83\x86\x84") + frame(HEADERS, END_HEADERS, 3, b"\x83\x86\x84")
    ],
    "trailers twice": [CALL + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x82") * 2],
    "a length the body has not": [h2_request([*GRPC, ("content-length", "7")], end=False) + frame(DATA, 1, 1, b"abc")],
    "a length of thirty digits": [
        h2_request([*GRPC, ("content-length", "9" * 30)], end=False) + frame(DATA, 1, 1, b"a")
    ],
    "no authority": [changed(":authority", None)],
    "a scheme nobody has": [changed(":scheme", "gopher")],
    "a path of a URL": [changed(":path", "http://a:99999/")],
    "a message that inflates": [
        h2_request([*GRPC, ("grpc-encoding", "gzip")], end=False) + message(BOMB[:16_000], flag=1)
    ],
    "an answer nobody makes room for": [
        H2_PREFACE
        + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
        + h2_request([(":method", "GET"), *GRPC[1:2], (":path", "/metrics"), GRPC[3]])[len(H2_PREFACE) :]
    ],
    "half a preface": [H2_PREFACE[:12]],
    "half a frame": [H2_PREFACE + frame(HEADERS, END_HEADERS, 1, b"abc", length=200)],
    "no settings": [H2_PREFACE[:24] + frame(PING, 0, 0, b"x" * 8)],
    "a frame of 16 MB": [H2_PREFACE + frame(DATA, 0, 1, b"", length=0xFFFFFF)],
    "settings of odd length": [H2_PREFACE + frame(SETTINGS, 0, 0, b"abc")],
    "settings on a stream": [H2_PREFACE + frame(SETTINGS, 0, 1)],
    "settings out of range": [H2_PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0xFFFFFFFF))],
    "no frames at all allowed": [H2_PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 1))],
    "a flood of settings": [H2_PREFACE + frame(SETTINGS) * 2000],
    "a flood of pings": [H2_PREFACE + frame(PING, 0, 0, b"x" * 8) * 2000],
    "a flood of priorities": [H2_PREFACE + frame(PRIORITY, 0, 1, b"\0\0\0\0\x10") * 2000],
    "a stream that depends on itself": [H2_PREFACE + frame(PRIORITY, 0, 1, b"\0\0\0\x01\x10")],
    "a push from the client": [H2_PREFACE + frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\x02\x82")],
    "an even stream": [H2_PREFACE + frame(HEADERS, END_HEADERS | END_STREAM, 2, b"\x82")],
    "headers on stream 0": [H2_PREFACE + frame(HEADERS, END_HEADERS, 0, b"\x82")],
    "headers that are no HPACK": [H2_PREFACE + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xff" * 50)],
    "a table size of 4 GB": [H2_PREFACE + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x3f\xe1\xff\xff\xff\x0f")],
    "headers that never end": [
        H2_PREFACE + frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b" * 1000) * 200
    ],
    "a hundred kilobytes of headers": [h2_request([*GRPC, *((f"x-{n}", "y" * 1000) for n in range(100))])],
    "ten thousand headers": [h2_request([*GRPC, *((f"x-{n}", "y") for n in range(10_000))])],
    "a continuation of nothing": [H2_PREFACE + frame(CONTINUATION, END_HEADERS, 1, b"\x82")],
    "something between headers": [H2_PREFACE + frame(HEADERS, 0, 1, b"\x82") + frame(PING, 0, 0, b"x" * 8)],
    "a window of nothing more": [CALL + frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\0")],
    "a window over 2^31": [CALL + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2],
    "a reset of an idle stream": [H2_PREFACE + frame(RST_STREAM, 0, 9, b"\0\0\0\0")],
    "a goodbye, then more": [CALL + frame(GOAWAY, 0, 0, b"\0\0\0\0\0\0\0\0") + message(b"")],
    "padding over the frame": [H2_PREFACE + frame(HEADERS, 0x8 | END_HEADERS, 1, b"\xff\x82")],
    "streams opened and reset": [
        H2_PREFACE
        + b"".join(
            # An index of the static table each: GET / over http.
            frame(HEADERS, END_HEADERS | END_STREAM, number, b"\x82\x86\x84")
            + frame(RST_STREAM, 0, number, b"\0\0\0\x08")
            for number in range(1, 2001, 2)
        )
    ],
    "more streams than allowed": [
        H2_PREFACE + b"".join(frame(HEADERS, END_HEADERS, number, b"\x83\x86\x84") for number in range(1, 601, 2))
    ],
    "data after the end": [CALL + message(b"") + frame(DATA, 0, 1, b"abc") * 3],
    "no path": [changed(":path", None)],
    "an empty path": [changed(":path", "")],
    "a method nobody has": [changed(":path", "/k1s0.system.saga.v1.SagaService/Nope")],
    "no method": [changed(":method", None)],
    "GET": [changed(":method", "GET")],
    "no content type": [changed("content-type", None)],
    "a foreign content type": [changed("content-type", "text/html")],
    "no te": [changed("te", None)],
    "a timeout that is none": [h2_request([*GRPC, ("grpc-timeout", "soon")])],
    "a timeout below nothing": [h2_request([*GRPC, ("grpc-timeout", "-1S")])],
    "a timeout of no end": [h2_request([*GRPC, ("grpc-timeout", "99999999H")], end=False) + message(b"")],
    "metadata that is no base64": [h2_request([*GRPC, ("x-bin", "%%%")], end=False) + message(b"")],
    "a header in capitals": [h2_request([*GRPC, ("X-Big", "1")])],
    "a connection header": [h2_request([*GRPC, ("connection", "close")])],
    "a line break in a header": [h2_request([*GRPC, ("x", "a\r\nb: c")])],
    "no message": [CALL + frame(DATA, END_STREAM, 1)],
    "half a prefix": [CALL + frame(DATA, END_STREAM, 1, b"\0\0")],
    "a message of 4 GB": [CALL + message(b"abc", length=0xFFFFFFFF)],
    "a message cut short": [CALL + message(b"abc", length=100)],
    "a message longer than it says": [CALL + message(b"abc", length=1)],
    "a compressed message": [CALL + message(b"abc", flag=1)],
    "bytes that are no message": [CALL + message(b"\xff\xff\xff")],
    "a message that never comes": [CALL],
}
EVERYTHING = {**HOSTILE, **HTTP2}

HELLO = bytes.fromhex("1603010200010001fc0303")
"""The head of a ClientHello of 512 bytes."""

NO_HANDSHAKES: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x16",
    "plain HTTP/1": b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    "plain HTTP/2": H2_PREFACE,
    "noise": b"\xff\x00\xfe" * 300,
    "noise in a record": HELLO + b"\xff" * 508,
    "half a hello": HELLO + b"\x00" * 20,
    "a record of no length": b"\x16\x03\x01\x00\x00" * 50,
    "a record over the limit": b"\x16\x03\x01\xff\xff" + b"\x00" * 2000,
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "data before the handshake": b"\x17\x03\x03\x00\x10" + b"x" * 16,
    "SSL 2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"\x00" * 40,
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a proxy's line": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
}


async def send(stream: trio.abc.Stream, parts: Sequence[bytes]) -> None:
    """Sends what there is, and reads until the server closes or is quiet."""
    try:
        for part in parts:
            await stream.send_all(part)
        while True:
            with trio.move_on_after(QUIET_SECS) as scope:
                if not await stream.receive_some():
                    return
            if scope.cancelled_caught:
                return
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(stream)


async def amid_honest_clients(doors: Doors, hostile: Callable[[], Awaitable[None]]) -> None:
    """Runs `hostile`; meanwhile, and after it, both doors answer."""
    over = trio.Event()

    async def ask() -> None:
        while not over.is_set():
            await doors.check()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        with trio.fail_after(30):
            await hostile()
        over.set()
    await doors.check()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("door", ["rest", "grpc"])
async def test_hostile_bytes_cost_the_connection_they_come_on_at_most(
    tmp_path: Path, door: str, tls: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_doors(tmp_path, tls=tls) as doors:
        port = doors.rest_port if door == "rest" else doors.grpc_port

        async def one(name: str, parts: Sequence[bytes]) -> None:
            with_http2 = door == "grpc" or name in HTTP2 or name.startswith("h2 ")
            await send(await doors.connect(port, "h2" if with_http2 else "http/1.1"), parts)

        async def all_of_them() -> None:
            async with trio.open_nursery() as nursery:
                for name, parts in EVERYTHING.items():
                    nursery.start_soon(one, name, parts)

        await amid_honest_clients(doors, all_of_them)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("door", ["rest", "grpc"])
async def test_what_is_no_handshake_is_cut_off_in_time(
    tmp_path: Path, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.handshakes.HANDSHAKE_SECS", 0.3)
    monkeypatch.setattr("rpc.handshakes.HANDSHAKE_SECS", 0.3)
    async with open_doors(tmp_path, tls=True) as doors:
        port = doors.rest_port if door == "rest" else doors.grpc_port

        async def one(content: bytes) -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                try:
                    await stream.send_all(content)
                    while await stream.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass

        async def slowly() -> None:
            """A handshake that goes on as long as it is let, a byte at a time."""
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                for number in HELLO + b"\x00" * 512:
                    try:
                        await stream.send_all(bytes([number]))
                    except trio.BrokenResourceError:
                        return
                    with trio.move_on_after(0.05):
                        try:
                            if not await stream.receive_some():
                                return
                        except trio.BrokenResourceError:
                            return
            raise AssertionError("nobody ended the handshake")

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slowly)
                for content in NO_HANDSHAKES.values():
                    nursery.start_soon(one, content)
        monkeypatch.undo()  # an honest client on a busy machine may take longer
        await doors.check()


@pytest.mark.parametrize("door", ["rest", "grpc"])
async def test_those_that_only_hold_a_handshake_lose_their_places_to_each_other(
    tmp_path: Path, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = web.handshakes if door == "rest" else rpc.handshakes
    monkeypatch.setattr(module, "HANDSHAKE_SECS", 300.0)
    monkeypatch.setattr(module, "MOST_HANDSHAKES", 10)
    async with open_doors(tmp_path, tls=True) as doors:
        port = doors.rest_port if door == "rest" else doors.grpc_port
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(40)]
        ended = 0

        async def until_closed(stream: trio.SocketStream) -> None:
            nonlocal ended
            try:
                await stream.receive_some()
            except trio.BrokenResourceError:
                pass
            ended += 1
            if ended == 30:
                nursery.cancel_scope.cancel()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for stream in silent:
                    nursery.start_soon(until_closed, stream)
            # The last ten still hold all places, and an honest client gets through.
            await doors.check()
        for stream in silent:
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("door", ["rest", "grpc"])
async def test_handshakes_under_way_do_not_hold_the_stop_up(
    tmp_path: Path, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.handshakes.HANDSHAKE_SECS", 300.0)
    monkeypatch.setattr("rpc.handshakes.HANDSHAKE_SECS", 300.0)
    with trio.fail_after(20):
        async with open_doors(tmp_path, tls=True) as doors:
            silent = await trio.open_tcp_stream("127.0.0.1", doors.rest_port if door == "rest" else doors.grpc_port)
            await doors.check()
        await trio.aclose_forcefully(silent)


@pytest.mark.parametrize("door", ["rest", "grpc"])
async def test_a_client_cannot_begin_another_handshake_on_its_connection(tmp_path: Path, door: str) -> None:
    openssl = which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    async with open_doors(tmp_path, tls=True) as doors:
        assert doors.made is not None
        port = doors.rest_port if door == "rest" else doors.grpc_port
        done = await trio.run_process(
            [openssl, "s_client", "-tls1_2", "-CAfile", doors.made.ca_file, "-connect", f"127.0.0.1:{port}"],
            stdin=b"R\n",
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        output = done.stdout + done.stderr
        assert b"Protocol  : TLSv1.2" in output
        assert b"RENEGOTIATING" in output
        assert output.count(b"depth=0") == 1  # said once for each handshake that got so far
        await doors.check()
