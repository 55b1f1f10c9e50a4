"""A client of the REST door in a process of its own: so many requests over kept connections; prints their rate."""

from __future__ import annotations

import argparse
import json
import ssl
import time

import trio


class Connection:
    """HTTP/1.1, one request at a time, every answer of a length that is said."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._rest = b""

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        await self._stream.send_all(request)
        while b"\r\n\r\n" not in self._rest:
            await self._receive()
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        status, *fields = head.split(b"\r\n")
        length = next(int(field[15:]) for field in fields if field[:15].lower() == b"content-length:")
        while len(self._rest) < length:
            await self._receive()
        body, self._rest = self._rest[:length], self._rest[length:]
        return int(status.split()[1]), body

    async def _receive(self) -> None:
        received = await self._stream.receive_some()
        assert received, "the server has closed the connection"
        self._rest += received


async def run(
    port: int, ca_file: str | None, request: bytes, expected: int, requests: int, at_once: int
) -> tuple[float, bytes]:
    """Seconds for all requests, and the body of an answer."""
    context = None if ca_file is None else ssl.create_default_context(cafile=ca_file)
    left = requests
    body = b""

    async def worker(connection: Connection) -> None:
        nonlocal left, body
        while left > 0:
            left -= 1
            status, body = await connection.ask(request)
            assert status == expected, body

    connections = []
    for _ in range(at_once):
        stream: trio.abc.Stream = await trio.open_tcp_stream("127.0.0.1", port)
        if context is not None:
            stream = trio.SSLStream(stream, context, server_hostname="localhost")
        connections.append(Connection(stream))
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(worker, connection)
    return time.perf_counter() - started, body


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.door_client")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ca-file")
    parser.add_argument("--token")
    parser.add_argument("--read", help="the id of a saga to read; without it sagas are started")
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--at-once", type=int, default=32)
    options = parser.parse_args()
    fields = {"Host": "localhost"}
    if options.token:
        fields["Authorization"] = f"Bearer {options.token}"
    body, line, expected = b"", f"GET /api/v1/sagas/{options.read} HTTP/1.1", 200
    if not options.read:
        payload = {"order": "A-1001", "card": "4111-1111", "items": [{"sku": f"sku-{number}"} for number in range(5)]}
        body = json.dumps({"workflow_name": "order", "payload": payload}).encode()
        line, expected = "POST /api/v1/sagas HTTP/1.1", 201
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    head = "\r\n".join([line, *(f"{name}: {value}" for name, value in fields.items()), "", ""])
    seconds, answer = trio.run(
        run, options.port, options.ca_file, head.encode() + body, expected, options.requests, options.at_once
    )
    print(json.dumps({"requests_per_s": options.requests / seconds, "answer": json.loads(answer)}))


if __name__ == "__main__":
    main()
