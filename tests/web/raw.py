"""Bytes on a connection: for what no well-behaved client sends."""

from __future__ import annotations

from collections.abc import Sequence

import h2.config
import h2.connection
import h2.events
import trio

H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"


async def exchange(port: int, *parts: bytes, wait_secs: float = 2.0) -> bytes:
    """Sends each part after the answer to the one before began, then reads until the server closes or is quiet."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    received = b""
    async with stream:
        for part in parts:
            try:
                await stream.send_all(part)
            except trio.BrokenResourceError:
                break
            with trio.move_on_after(0.1):
                received += await stream.receive_some()
        with trio.move_on_after(wait_secs):
            try:
                while chunk := await stream.receive_some():
                    received += chunk
            except trio.BrokenResourceError:
                pass
    return received


def h2_request(headers: Sequence[tuple[str | bytes, str | bytes]], *, end: bool = True) -> bytes:
    """The bytes of an HTTP/2 connection whose first stream has these headers, whatever they are."""
    connection = _client()
    connection.send_headers(1, list(headers), end_stream=end)
    return connection.data_to_send()


def _client() -> h2.connection.H2Connection:
    config = h2.config.H2Configuration(
        client_side=True,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        header_encoding="utf-8",
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    return connection


class H2Client:
    """A small HTTP/2 client with prior knowledge that does as it is told."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.connection = _client()

    async def send(self) -> None:
        await self._stream.send_all(self.connection.data_to_send())

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def request(self, method: str, path: str, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()) -> int:
        """Sends a request whole; returns its stream."""
        stream_id = self.connection.get_next_available_stream_id()
        pseudo = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "a")]
        self.connection.send_headers(stream_id, [*pseudo, *headers], end_stream=not body)
        await self.send()
        while body:
            window = min(self.connection.local_flow_control_window(stream_id), self.connection.max_outbound_frame_size)
            if window:
                self.connection.send_data(stream_id, body[:window], end_stream=len(body) <= window)
                body = body[window:]
                await self.send()
            else:
                await self.events()
        return stream_id

    async def events(self) -> list[h2.events.Event]:
        data = await self._stream.receive_some()
        if not data:
            raise EOFError
        events = self.connection.receive_data(data)
        await self.send()
        return events

    async def answer(self, stream_id: int) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer on that stream. `EOFError`: the connection ended first."""
        status, headers, body = 0, {}, b""
        while True:
            for event in await self.events():
                if getattr(event, "stream_id", None) != stream_id:
                    continue
                if isinstance(event, h2.events.ResponseReceived):
                    headers = {str(name): str(value) for name, value in event.headers}
                    status = int(headers[":status"])
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data
                    self.connection.acknowledge_received_data(event.flow_controlled_length, stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    return status, headers, body
                elif isinstance(event, h2.events.StreamReset):
                    raise EOFError
