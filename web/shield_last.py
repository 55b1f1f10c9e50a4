"""Holds off a defect of Quart-Trio 0.12/0.13 under hypercorn 0.18: idle connections that are never closed.

Quart-Trio cancels the request's nursery as soon as its last body message is on its way. hypercorn starts the idle timer
of the connection inside that very `send`, so the cancel hits the start: `keep_alive_timeout` is then never enforced,
and every graceful shutdown waits the full `graceful_timeout` for a client that merely stays connected. The last `send`
of a request is shielded here, for `LAST_SECS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


LAST_SECS = 12.0
"""Longest a client may take for the end of its answer. A little longer than `saga.door_limits.STALLED_SECS`, after
which whoever sends it gives up in good order."""


def shield_last(app: Asgi) -> Asgi:
    """`app`, with the last message of each HTTP response sent to its end whatever is cancelled."""

    async def shielded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_shielded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                with trio.move_on_after(LAST_SECS, shield=True):
                    await send(message)
            else:
                await send(message)

        await app(scope, receive, send_shielded if scope["type"] == "http" else send)

    return shielded
