"""Random calls and random frames for the gRPC port of a server process: none ends it, none is answered as an error of
ours, and none leaves anything behind."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable

import h2.config
import h2.connection
import h2.events
import trio
from k1s0.system.saga.v1 import saga_pb2 as pb

CALLS = 20
"""On one connection, one after the other."""
REPLY_SECS = 60.0
"""A call that is not answered by then never will be; waits within requests are below that."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SERVICE = "/k1s0.system.saga.v1.SagaService/"
METHODS = tuple(pb.DESCRIPTOR.services_by_name["SagaService"].methods_by_name)
OUR_FAULT = frozenset({2, 13, 15})
"""UNKNOWN, INTERNAL, DATA_LOSS."""
WORDS = (
    b"",
    b"order",
    b"\xff\xfe",
    b"{}",
    b"[" * 200,
    b'{"a": 1e400}',
    b"name: a\nsteps: []",
    b"\0",
    b"x" * 300,
    b"-1",
)


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def message(draw: random.Random) -> bytes:
    """Bytes that look like protobuf: fields with any number and type, huge varints, lengths that lie, noise."""
    built = bytearray()
    for _ in range(draw.randrange(6)):
        kind = draw.randrange(10)
        number = draw.choice((0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 15, 16, 2047, 2**29 - 1, 2**32))
        if kind < 2:
            built += varint(number << 3) + varint(draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, 2**70, 2**500)))
        elif kind < 6:
            inner = message(draw) if draw.random() < 0.2 else draw.choice((*WORDS, draw.randbytes(draw.randrange(40))))
            length = len(inner) if draw.random() < 0.8 else draw.choice((0, 2**31, 2**63, len(inner) + 5))
            built += varint(number << 3 | 2) + varint(length) + inner
        elif kind == 6:
            built += varint(number << 3 | draw.choice((1, 5))) + draw.randbytes(draw.choice((0, 4, 8)))
        elif kind == 7:
            built += varint(number << 3 | draw.choice((3, 4, 6, 7))) * draw.choice((1, 1, 200))
        elif kind == 8:
            built += draw.randbytes(draw.randrange(30))
        else:
            built += b"\x80" * draw.randrange(1, 20)
    return bytes(built)


def framed(draw: random.Random) -> bytes:
    """The message in its gRPC envelope, which may lie."""
    body = message(draw)
    length = len(body) if draw.random() < 0.9 else draw.choice((0, 1, len(body) + 1, 2**20, 2**31, 2**32 - 1))
    return struct.pack(">BI", draw.choice((0,) * 20 + (1, 255)), length) + body


def frames(draw: random.Random) -> bytes:
    """HTTP/2 from its preface on: frames of any type, flags, stream and length."""
    sent = bytearray(PREFACE[: draw.randrange(len(PREFACE))] if draw.random() < 0.03 else PREFACE)
    if draw.random() < 0.9:
        sent += b"\0\0\0\x04\0\0\0\0\0"
    for _ in range(draw.randrange(1, 20)):
        kind = draw.choice((*range(10), *range(10), 0x42, 255))
        stream = draw.choice((0, 0, 1, 1, 1, 2, 3, 5, 7, 2**31 - 1, 2**32 - 1))
        noise = draw.randbytes(draw.choice((4, 5, 6, 8, draw.randrange(100))))
        payload = draw.choice((b"", b"\x82", b"\x83\x86\x84", noise, noise, noise, b"\0\0\0\0\x07abcdefg"))
        length = len(payload) if draw.random() < 0.9 else draw.choice((0, 1, 2**14 + 1, 2**24 - 1))
        sent += length.to_bytes(3, "big") + struct.pack(">BBI", kind, draw.choice((0, 1, 4, 5, 8, 0x20, 255)), stream)
        sent += payload
    return bytes(sent)


async def call_all(port: int, draw: random.Random, count: int, seen: Counter[str]) -> None:
    """So many calls on one connection; each is answered, and not with an error of ours."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    async with stream:
        for _ in range(count):
            method = draw.choice(METHODS) if draw.random() < 0.97 else draw.choice(("", "Nope", "\x7f"))
            body = framed(draw)
            number = connection.get_next_available_stream_id()
            connection.send_headers(
                number,
                [
                    *((":method", "POST"), (":scheme", "http"), (":path", SERVICE + method), (":authority", "a")),
                    *(("te", "trailers"), ("content-type", "application/grpc")),
                    *((("grpc-timeout", "1S"),) if draw.random() < 0.2 else ()),
                ],
            )
            connection.send_data(number, body, end_stream=True)
            await stream.send_all(connection.data_to_send())
            with trio.fail_after(REPLY_SECS):
                status = await _status(stream, connection, number)
            assert status not in OUR_FAULT, (method, body, status)
            seen[f"status {status}"] += 1


async def _status(stream: trio.SocketStream, connection: h2.connection.H2Connection, number: int) -> int:
    """The status of the call; -1: its stream was reset."""
    status, ended = None, False
    while not ended:
        data = await stream.receive_some()
        assert data, "the server ended the connection of an honest client"
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if getattr(event, "stream_id", None) != number:
                continue
            if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                found = {str(name): str(value) for name, value in event.headers}.get("grpc-status")
                status = status if found is None else int(found)
            elif isinstance(event, h2.events.StreamReset):
                return -1 if status is None else status
            elif isinstance(event, h2.events.StreamEnded):
                ended = True
        await stream.send_all(connection.data_to_send())
    assert status is not None, "an answer without a status"
    return status


async def send_frames(port: int, sent: bytes, seen: Counter[str]) -> None:
    """The bytes, and the end of what is sent; the server ends the connection then."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        with trio.fail_after(REPLY_SECS):
            await stream.send_all(sent)
            await stream.send_eof()
            while await stream.receive_some():
                pass
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(stream)
    seen["connection"] += 1


async def run(port: int, cases: int, number: int, rss: Callable[[], int]) -> tuple[Counter[str], int]:
    """Half of the cases are calls, half connections of frames. What came of them, and by how many bytes the server has
    grown in the second half of the time."""
    draw = random.Random(number)
    seen: Counter[str] = Counter()
    half_way = 0
    for done in range(0, cases, 2 * CALLS):
        if half_way == 0 and done >= cases // 2:
            half_way = rss()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call_all, port, random.Random(draw.random()), CALLS, seen)
            for _ in range(CALLS):
                nursery.start_soon(send_frames, port, frames(draw), seen)
    return seen, rss() - half_way
