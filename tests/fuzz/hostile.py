"""Hostile requests in numbers, one kind after the other: how much the server has grown by each, and how long others
waited meanwhile."""

from __future__ import annotations

import gzip
import json
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

import trio

from tests.fuzz.wire import PREFACE
from tests.server.test_hostile_connections import (
    CONTINUATION,
    DATA,
    FILL,
    GRPC,
    HEADERS,
    PING,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)
from tests.web.raw import H2_PREFACE, H2Client, h2_request

AT_A_TIME = 50
"""Connections of one kind; each waits for the answer, or for the end of it."""

FLOOD = 1000
"""Frames of a flood; more than the server bears."""
FLOOD_COUNTS = 20
"""What one counts as."""


class Kind(NamedTuple):
    """`sent` on each connection, which counts as so many `requests`; `known`: when one on it has been answered."""

    sent: bytes
    requests: int = 1
    known: bool = False


class Outcome(NamedTuple):
    """By how many bytes the server grew over the first half, and by how many over the second; and the longest that
    somebody else waited for an answer, at whichever door, on a connection they had and on a new one."""

    first: int
    second: int
    known_secs: float
    new_secs: float


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    head = [f"POST {path} HTTP/1.1".encode(), b"Host: a", b"Connection: close", b"Content-Type: application/json"]
    return b"\r\n".join([*head, *headers, b"Content-Length: %d" % len(body), b"", body])


def start(payload: bytes) -> bytes:
    return post("/api/v1/sagas", b'{"workflow_name": "none", "payload": ' + payload + b"}")


def framed(body: bytes) -> bytes:
    pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)] or [b""]
    return b"".join(frame(DATA, 0, 1, piece) for piece in pieces[:-1]) + frame(DATA, 1, 1, pieces[-1])


def call(body: bytes, *, length: int | None = None, compressed: bool = False) -> bytes:
    size = len(body) if length is None else length
    head = h2_request([*GRPC, *([("grpc-encoding", "gzip")] if compressed else [])], end=False)
    return head + framed(struct.pack(">?I", compressed, size) + body)


def get(path: str) -> bytes:
    return h2_request([(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "a")])


CHUNKED = b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
ASK = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
NO_WINDOW = H2_PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
BOMB = gzip.compress(b"\0" * 10_000_000)

REST: dict[str, Kind] = {
    "a body over the limit": Kind(start(b'{"a": "' + b"x" * 1_300_000 + b'"}')),
    "a compressed body of 10 kB that inflates to 10 MB": Kind(
        post("/api/v1/sagas", BOMB[:10_000], b"Content-Encoding: gzip")
    ),
    "deep JSON": Kind(start(b"[" * 100_000)),
    "deep JSON within the parser's bound": Kind(start(b'{"a":' * 500 + b"1" + b"}" * 500)),
    "many headers": Kind(post("/api/v1/sagas", b"{}", *(b"X-%d: y" % number for number in range(200)))),
    "headers over the limit": Kind(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"),
    "a folded header of no end": Kind(b"GET / HTTP/1.1\r\nHost: a\r\nX: a" + b"\r\n b" * 30_000),
    "a target of 100 kB": Kind(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a bad Host": Kind(b"GET /healthz HTTP/1.1\r\nHost: a b/c\r\nConnection: close\r\n\r\n"),
    "an absolute target": Kind(b"GET http://a:99999/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    "CONNECT": Kind(b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    "Upgrade to h2c": Kind(
        ASK + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    ),
    "Upgrade to a WebSocket": Kind(
        ASK + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ),
    "a length and chunks": Kind(CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n0\r\n\r\n"),
    "an endless chunk extension": Kind(CHUNKED + b"1;" + b"e" * 100_000),
    "chunks of a byte with extensions": Kind(CHUNKED + b"1;a=b\r\nx\r\n" * 100 + b"0\r\n\r\n"),
    "a body that is expected and never sent": Kind(
        b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    ),
    "a hundred requests in one go": Kind((ASK + b"\r\n") * 100, requests=100),
    "half a head": Kind(b"GET / HTTP/1.1\r\nHost: a\r\nX: "),
    "half a body": Kind(b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n" + b"x" * 1000),
    "deep YAML": Kind(post("/api/v1/workflows", json.dumps({"workflow_yaml": "a: " + "[" * 5000}).encode())),
    "long YAML": Kind(post("/api/v1/workflows", json.dumps({"workflow_yaml": "a: 1\n" * 60_000}).encode())),
    "many steps": Kind(post("/api/v1/workflows", json.dumps({"workflow_yaml": "steps:" + "\n- {}" * 2000}).encode())),
    "a long query": Kind(b"GET /api/v1/sagas?" + b"a=1&" * 2000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
    "an answer over HTTP/2 that nobody makes room for": Kind(NO_WINDOW + get("/metrics")[len(H2_PREFACE) :]),
}
GRPC_KINDS: dict[str, Kind] = {
    "a message over the limit": Kind(call(b"", length=2**31)),
    "a long message": Kind(call(b"\x12" + b"\xff" * 60_000)),
    "a message cut short": Kind(call(b"x" * 100, length=1000)),
    "a compressed message of 10 kB that inflates to 10 MB": Kind(call(BOMB[:10_000], compressed=True)),
    "a call without a message": Kind(h2_request(GRPC, end=False)),
    "an answer that nobody makes room for": Kind(NO_WINDOW + call(b"\x0a\x01a")[len(H2_PREFACE) :]),
}
OPEN = h2_request(GRPC, end=False)
"""A request with a body to come, at either door."""
STREAMS = range(3, 403, 2)
RESETS = b"".join(
    frame(HEADERS, 5, number, b"\x83\x86\x84") + frame(RST_STREAM, 0, number, b"\0\0\0\x08") for number in STREAMS
)
REQUESTS = b"".join(frame(HEADERS, 5, number, b"\x83\x86\x84") for number in STREAMS[:90])
"""As many as there may be at a time."""
HTTP2: dict[str, Kind] = {
    "a flood of settings": Kind(H2_PREFACE + frame(SETTINGS) * FLOOD, FLOOD_COUNTS),
    "a flood of pings": Kind(H2_PREFACE + frame(PING, 0, 0, b"x" * 8) * FLOOD, FLOOD_COUNTS),
    "a flood of priorities": Kind(H2_PREFACE + frame(PRIORITY, 0, 1, b"\0\0\0\0\x10") * FLOOD, FLOOD_COUNTS),
    "a flood of empty data": Kind(OPEN + frame(DATA, 0, 1) * FLOOD, FLOOD_COUNTS),
    "a flood of data that is padding": Kind(OPEN + frame(DATA, 8, 1, b"\x0f" + b"\0" * 15) * FLOOD, FLOOD_COUNTS),
    "a flood of windows widened by one": Kind(OPEN + frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * FLOOD, FLOOD_COUNTS),
    "a flood of frames nobody knows": Kind(H2_PREFACE + frame(0x42, 0, 0, b"x") * FLOOD, FLOOD_COUNTS),
    "streams opened and reset": Kind(H2_PREFACE + RESETS, FLOOD_COUNTS),
    "streams opened and reset by somebody known": Kind(RESETS, FLOOD_COUNTS, known=True),
    "many requests by somebody known": Kind(REQUESTS, FLOOD_COUNTS, known=True),
    "a window over 2^31": Kind(OPEN + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 2),
    "a flood of continuations": Kind(
        H2_PREFACE + frame(HEADERS, 0, 1, b"\x82") + frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b" * 100) * 100
    ),
    "headers that never end": Kind(H2_PREFACE + frame(HEADERS, 0, 1, b"\x82")),
    "headers of 64 MB in 20 kB": Kind(
        H2_PREFACE + frame(HEADERS, 0, 1, FILL) + frame(CONTINUATION, 4, 1, b"\xbe" * 16_000)
    ),
    "a table of 4 GB": Kind(H2_PREFACE + frame(HEADERS, 5, 1, b"\x3f\xe1\xff\xff\xff\x0f")),
    "a table of 4 GB by settings": Kind(
        H2_PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 1, 0xFFFFFFFF)) + OPEN[len(H2_PREFACE) :]
    ),
    "more streams than allowed": Kind(
        H2_PREFACE + b"".join(frame(HEADERS, 4, number, b"\x83\x86\x84") for number in range(1, 301, 2)), FLOOD_COUNTS
    ),
    "half a preface": Kind(PREFACE[:10]),
}


def kinds(rest_port: int, grpc_port: int) -> Iterator[tuple[str, int, Kind]]:
    for name, kind in {**REST, **HTTP2}.items():
        yield f"REST, {name}", rest_port, kind
    for name, kind in {**GRPC_KINDS, **HTTP2}.items():
        yield f"gRPC, {name}", grpc_port, kind


Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]
Context = Callable[[str], ssl.SSLContext]
"""What to trust, by the protocol that is to be spoken."""


@asynccontextmanager
async def connected(port: int, protocol: str, trusting: Context | None) -> AsyncIterator[Stream]:
    plain = await trio.open_tcp_stream("127.0.0.1", port)
    async with plain:
        if trusting is None:
            yield plain
            return
        context = trusting(protocol)
        encrypted = trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True)
        await encrypted.do_handshake()
        yield encrypted


async def send(port: int, kind: Kind, trusting: Context | None) -> None:
    """Sends it, says that nothing more comes, and waits for the end."""
    protocol = "h2" if kind.known or kind.sent.startswith(PREFACE[:3]) else "http/1.1"
    try:
        with trio.move_on_after(60):
            async with connected(port, protocol, trusting) as stream:
                if kind.known:
                    await _ask(H2Client(stream), Asked(GRPC))
                await stream.send_all(kind.sent)
                if isinstance(stream, trio.SocketStream):
                    await stream.send_eof()
                else:
                    await stream.transport_stream.send_eof()
                while await stream.receive_some():
                    pass
    except OSError:
        pass
    except trio.BrokenResourceError:
        pass


class Asked(NamedTuple):
    """Something small."""

    headers: list[tuple[str, str]]
    body: bytes = b""


ASKED_OF_REST = Asked([(":method", "GET"), (":scheme", "http"), (":path", "/api/v1/workflows"), (":authority", "a")])
ASKED_OF_GRPC = Asked([(name, value.replace("GetSaga", "ListWorkflows")) for name, value in GRPC], b"\0" * 5)


class Witness:
    """Somebody who asks all the while. `longest_secs`: what they waited at most."""

    def __init__(self) -> None:
        self.longest_secs = 0.0

    async def stay(self, port: int, asked: Asked, trusting: Context | None) -> None:
        """On one connection."""
        async with connected(port, "h2", trusting) as stream:
            client = H2Client(stream)
            while True:
                with self._waiting():
                    assert await _ask(client, asked) == 200
                await trio.sleep(0.02)

    async def come(self, port: int, asked: Asked, trusting: Context | None) -> None:
        """On a new connection each time."""
        while True:
            with self._waiting():
                async with connected(port, "h2", trusting) as stream:
                    assert await _ask(H2Client(stream), asked) == 200
            await trio.sleep(0.1)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = trio.current_time()
        with trio.fail_after(60):
            yield
        self.longest_secs = max(self.longest_secs, trio.current_time() - began)


async def _ask(client: H2Client, asked: Asked) -> int:
    """The status of the answer."""
    number: int = client.connection.get_next_available_stream_id()
    client.connection.send_headers(number, asked.headers, end_stream=not asked.body)
    if asked.body:
        client.connection.send_data(number, asked.body, end_stream=True)
    await client.send()
    return (await client.answer(number))[0]


async def run(
    port: int,
    kind: Kind,
    count: int,
    rss: Callable[[], int],
    doors: tuple[int, int],
    trusting: Context | None = None,
) -> Outcome:
    """At least `count` requests of that kind, in two halves, while others ask at the `doors`, REST and gRPC."""
    connections = max(2, -(-count // kind.requests))
    left = connections
    known, new = Witness(), Witness()

    async def some(limit: int) -> None:
        nonlocal left
        while left > limit:
            left -= 1
            await send(port, kind, trusting)

    async def down_to(limit: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(min(AT_A_TIME, connections)):
                nursery.start_soon(some, limit)

    before = rss()
    async with trio.open_nursery() as nursery:
        for port_of_door, asked in zip(doors, (ASKED_OF_REST, ASKED_OF_GRPC), strict=True):
            nursery.start_soon(known.stay, port_of_door, asked, trusting)
            nursery.start_soon(new.come, port_of_door, asked, trusting)
        await down_to(connections // 2)
        between = rss()
        await down_to(0)
        nursery.cancel_scope.cancel()
    return Outcome(between - before, rss() - between, known.longest_secs, new.longest_secs)
