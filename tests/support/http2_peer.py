"""A peer that speaks HTTP/2 frame by frame, for answers no gRPC library would give.

    async def answer(peer: Http2Peer, stream_id: int) -> None:
        peer.h2.send_headers(stream_id, [(":status", "503")], end_stream=True)

    async with http2_peer(answer) as port: ...

`answer` runs when a request is complete; what it leaves in `peer.h2` is sent after it. `await peer.send(b"…")` sends
bytes as they are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded, StreamReset

GRPC_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]


def message(body: bytes) -> bytes:
    """`body` as a gRPC message."""
    return b"\x00" + len(body).to_bytes(4, "big") + body


class Http2Peer:
    """One connection. `resets` are the streams the client has given up, with their error codes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._sending = trio.Lock()
        self.resets: list[tuple[int, int]] = []
        self.h2 = H2Connection(
            H2Configuration(
                client_side=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=True,
            )
        )

    async def send(self, data: bytes = b"") -> None:
        """Sends what is waiting in `h2`, then `data`."""
        async with self._sending:
            await self.stream.send_all(self.h2.data_to_send() + data)

    async def close(self) -> None:
        await self.stream.aclose()


Answer = Callable[[Http2Peer, int], Awaitable[None]]


@asynccontextmanager
async def http2_peer(answer: Answer, peers: list[Http2Peer] | None = None) -> AsyncIterator[int]:
    """Listens while the block runs; gives the port. `peers` collects the connections."""

    async def serve(stream: trio.SocketStream) -> None:
        peer = Http2Peer(stream)
        if peers is not None:
            peers.append(peer)
        peer.h2.initiate_connection()
        try:
            await peer.send()
            async with trio.open_nursery() as answers:
                while data := await stream.receive_some():
                    for event in peer.h2.receive_data(data):
                        if isinstance(event, StreamEnded):
                            answers.start_soon(reply, peer, event.stream_id)
                        elif isinstance(event, StreamReset):
                            peer.resets.append((event.stream_id, int(event.error_code or 0)))
                    await peer.send()
                answers.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client, or `answer`, has closed the connection
        finally:
            await trio.aclose_forcefully(stream)

    async def reply(peer: Http2Peer, stream_id: int) -> None:
        await answer(peer, stream_id)
        await peer.send()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
