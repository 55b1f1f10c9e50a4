"""One HTTP request on its way through the door, and the answer to it, which is told of once, whoever gives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from saga.drain import Drain
from saga.errors import Overloaded
from saga.request_id import request_id
from saga.tracing import read_traceparent, single_traceparent
from web.api import error_reply
from web.asgi_scope import REQUEST_ID, SPAN, headers_by_name
from web.exchange import Reply
from web.request_log import RequestLog
from web.shield_last import Scope, Send

GONE = 499
"""The status told of when the client went away before it was answered; nginx's number for it."""

LAST_BYTES = 64 * 1024
"""What may go out with the end of an answer, which `shield_last` gives a short time."""


class AsgiExchange:
    """`headers` are by lower-case name; `request_id` is the client's own where it sent one."""

    def __init__(self, scope: Scope, send: Send, requests: RequestLog, drain: Drain) -> None:
        self.scope = scope
        self.headers = headers = headers_by_name(scope)
        self.request_id = scope[REQUEST_ID] = request_id(headers.get("x-request-id", [None])[-1])
        self._traceparent = single_traceparent(headers.get("traceparent", ()))
        scope[SPAN] = requests.span(self._traceparent, headers.get("tracestate", ()))
        self._has_connection_header = scope["http_version"] != "2"  # which forbids it
        self._send = send
        self._requests = requests
        self._drain = drain
        self._started = time.perf_counter()
        self._status = GONE
        self._is_told = False

    @property
    def log_fields(self) -> dict[str, str]:
        """What the lines that are written meanwhile have beside what they say."""
        caller = read_traceparent(self._traceparent)
        if caller is None:
            return {"request_id": self.request_id}
        return {"request_id": self.request_id, "trace_id": caller.trace_id}

    @property
    def has_begun(self) -> bool:
        """Something of the answer was sent."""
        return self._status != GONE

    def tell(self) -> None:
        """Tells of the request, unless that is done."""
        if not self._is_told:
            self._is_told = True
            self._requests.tell(self.scope, self._status, time.perf_counter() - self._started)

    async def send(self, message: dict[str, Any]) -> None:
        """ASGI's `send`."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            if self._drain.begun and self._has_connection_header:
                # A client that polls would otherwise ask this worker again and again to its end.
                message["headers"].append((b"connection", b"close"))
        elif not message.get("more_body", False):
            self.tell()  # before it is sent: whoever has the answer finds the line, and the count, there
        await self._send(message)

    async def refuse(self, error: Exception, *, closes: bool = False) -> None:
        """Answers with the error. `closes`: the connection, or over HTTP/2 the stream, is of no more use."""
        closing = {"Connection": "close"} if closes and self._has_connection_header else {}
        await send_reply(self.send, error_reply(error, self.request_id), closing)


def sending_within(exchange: AsgiExchange, has: Callable[[int], None]) -> Send:
    """A `send` for an answer that `has` is told the length of; if that raises `Overloaded`, the client is sent the
    error, and nothing of the answer. What was asked for is done, or was read; whoever asks again finds it so."""
    refused = False

    async def send(message: dict[str, Any]) -> None:
        nonlocal refused
        if refused:
            return
        if message["type"] == "http.response.start":
            try:
                has(_length(message))
            except Overloaded as error:
                refused = True
                await exchange.refuse(error)
                return
        await exchange.send(message)

    return send


def _length(start: dict[str, Any]) -> int:
    """Of the body that follows the start of an answer; 0: it does not say, and is none of ours."""
    return next((int(value) for name, value in start.get("headers", ()) if name.lower() == b"content-length"), 0)


async def send_reply(send: Send, reply: Reply, more_headers: dict[str, str] | None = None) -> None:
    """Sends a reply over ASGI."""
    headers = {
        "content-type": reply.content_type,
        "content-length": str(len(reply.body)),
        **reply.headers,
        **(more_headers or {}),
    }
    await send(
        {
            "type": "http.response.start",
            "status": reply.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    body = reply.body
    if len(body) > LAST_BYTES:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        body = b""
    await send({"type": "http.response.body", "body": body})
