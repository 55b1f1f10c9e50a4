"""Holds off two defects of hypercorn 0.18: an answer that waits for ever for a client that is gone, and a connection
that may stay for ever once it has said that it will speak HTTP/2.

The task that empties an HTTP/2 connection's buffers ends when the connection closes, and leaves the buffers as they
are; whoever is still answering on one of its streams then waits for it to be emptied, and the connection's nursery for
whoever waits. Here the buffers are closed too.

The preface of HTTP/2 looks like a request to the protocol before, which stops the clock of an idle connection; the
clock goes on when a request has ended, and there may never be one. Here it goes on at once.
"""

from __future__ import annotations

import hypercorn.protocol
from hypercorn.events import Closed, Event, Updated
from hypercorn.protocol.h2 import H2Protocol


class GuardedH2Protocol(H2Protocol):
    """One HTTP/2 connection; when it closes, nobody goes on waiting to write to it."""

    async def initiate(self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None) -> None:
        await super().initiate(headers, settings)
        if headers is None:
            await self.send(Updated(idle=True))

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()


def install() -> None:
    """hypercorn looks the class up in its module for each connection, and offers no other way to set it."""
    setattr(hypercorn.protocol, "H2Protocol", GuardedH2Protocol)  # noqa: B010  # not exported, so no plain assignment
