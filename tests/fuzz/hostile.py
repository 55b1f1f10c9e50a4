"""Hostile requests in numbers, one kind after the other, and how much the server has grown by each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator

import trio

from tests.fuzz.wire import PREFACE
from tests.server.test_hostile_connections import DATA, GRPC, HEADERS, PING, RST_STREAM, frame
from tests.web.raw import H2_PREFACE, h2_request

AT_A_TIME = 50
"""Connections of one kind; each waits for the answer, or for the end of it."""


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    head = [f"POST {path} HTTP/1.1".encode(), b"Host: a", b"Connection: close", b"Content-Type: application/json"]
    return b"\r\n".join([*head, *headers, b"Content-Length: %d" % len(body), b"", body])


def start(payload: bytes) -> bytes:
    return post("/api/v1/sagas", b'{"workflow_name": "none", "payload": ' + payload + b"}")


def call(body: bytes, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = h2_request(GRPC, end=False)
    pieces = [struct.pack(">?I", False, size) + body]
    pieces = [pieces[0][at : at + 16384] for at in range(0, len(pieces[0]), 16384)]
    return head + b"".join(frame(DATA, 0, 1, piece) for piece in pieces[:-1]) + frame(DATA, 1, 1, pieces[-1])


REST: dict[str, bytes] = {
    "a body over the limit": start(b'{"a": "' + b"x" * 1_300_000 + b'"}'),
    "deep JSON": start(b"[" * 100_000),
    "deep JSON within the parser's bound": start(b'{"a":' * 500 + b"1" + b"}" * 500),
    "many headers": post("/api/v1/sagas", b"{}", *(b"X-%d: y" % number for number in range(200))),
    "headers over the limit": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "half a head": b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
    "half a body": b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: 900000\r\n\r\n" + b"x" * 1000,
    "deep YAML": post("/api/v1/workflows", json.dumps({"workflow_yaml": "a: " + "[" * 5000}).encode()),
    "long YAML": post("/api/v1/workflows", json.dumps({"workflow_yaml": "a: 1\n" * 60_000}).encode()),
    "many steps": post("/api/v1/workflows", json.dumps({"workflow_yaml": "steps:" + "\n- {}" * 2000}).encode()),
    "a long query": b"GET /api/v1/sagas?" + b"a=1&" * 2000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
}
GRPC_KINDS: dict[str, bytes] = {
    "a message over the limit": call(b"", length=2**31),
    "a long message": call(b"\x12" + b"\xff" * 60_000),
    "a message cut short": call(b"x" * 100, length=1000),
    "a flood of pings": H2_PREFACE + frame(PING, 0, 0, b"x" * 8) * 500,
    "streams opened and reset": H2_PREFACE
    + b"".join(
        frame(HEADERS, 5, number, b"\x83\x86\x84") + frame(RST_STREAM, 0, number, b"\0\0\0\x08")
        for number in range(1, 401, 2)
    ),
    "headers that never end": H2_PREFACE + frame(HEADERS, 0, 1, b"\x82"),
    "a call without a message": h2_request(GRPC, end=False),
    "half a preface": PREFACE[:10],
}


def kinds(rest_port: int, grpc_port: int) -> Iterator[tuple[str, int, bytes]]:
    for name, sent in REST.items():
        yield f"REST, {name}", rest_port, sent
    for name, sent in GRPC_KINDS.items():
        yield f"gRPC, {name}", grpc_port, sent


async def send(port: int, sent: bytes) -> None:
    """Sends it, says that nothing more comes, and waits for the end."""
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            with trio.move_on_after(60):
                await stream.send_all(sent)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
    except OSError:
        pass
    except trio.BrokenResourceError:
        pass


async def run(port: int, sent: bytes, count: int, rss: Callable[[], int]) -> tuple[int, int]:
    """By how many bytes the server has grown over the first tenth, and from there to the end."""
    left = count
    before = rss()

    async def some(limit: int) -> None:
        nonlocal left
        while left > limit:
            left -= 1
            await send(port, sent)

    async def down_to(limit: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(min(AT_A_TIME, count)):
                nursery.start_soon(some, limit)

    await down_to(count - count // 10)
    warm = rss()
    await down_to(0)
    return warm - before, rss() - warm
