"""What every HTTP request passes before Quart sees it: who it is from, its body within bounds, and the room for it.

The two calls a busy client makes all day, starting a saga and reading one, are answered here: Quart's request objects
and nursery cost about as much as the rest of such a call. They run the same operations in the same way; Quart has all
other routes, and these two too when anything about the request is out of the ordinary.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit

import h11
import quart.wrappers.base

from saga.access import NOBODY, Principal, single_authorization
from saga.authentication import Authenticator
from saga.door_limits import BodyRoom, DoorLimits, Room, check_header_count
from saga.drain import Drain
from saga.errors import Detail, Invalid, PermissionDenied, RequestError, Unavailable
from saga.log_fields import about
from saga.meter import Meter
from saga.tracing import Tracer
from saga.workflow_yaml import MAX_YAML_BYTES
from web.api import BASE, Api, Operation
from web.asgi_exchange import AsgiExchange, send_reply, sending_within
from web.asgi_scope import PRINCIPAL, ROUTE, request_of
from web.body import ClientGone, Unread, discard_body, read_body
from web.other_sites import is_from_another_site, is_to_loopback
from web.request_log import PROBED, RequestLog
from web.shield_last import Asgi, Receive, Scope, Send

BODY_SLACK_BYTES = 64 * 1024
"""What a request may have beside its payload."""
WORKFLOW_BODY_BYTES = 2 * MAX_YAML_BYTES
"""The longest workflow as a JSON string with every character escaped by one other, as line ends and quotes are."""

READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing; what they answer, a browser does not show to pages of other sites."""

HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
"""What a host, with its port, is made of (RFC 9110, 7.2); empty where the target needs none."""

QUART_CLIENT_GONE: type[Exception] = getattr(quart.wrappers.base, "ClientDisconnectedError", ClientGone)
"""What quart raises since 0.23, out of the application, where the client went before its answer. (Below Python 3.13 we
have 0.22, which does not.)"""


class Door:
    """An ASGI application around another."""

    def __init__(
        self,
        inner: Asgi,
        api: Api,
        authenticator: Authenticator,
        meter: Meter,
        tracer: Tracer,
        drain: Drain,
        max_payload_bytes: int,
        limits: DoorLimits,
        *,
        loopback_names_only: bool = False,
    ) -> None:
        self._inner = inner
        self._api = api
        self._authenticator = authenticator
        self._drain = drain
        self._loopback_names_only = loopback_names_only
        self._max_body_bytes = max(max_payload_bytes, WORKFLOW_BODY_BYTES) + BODY_SLACK_BYTES
        self._room = Room(limits.max_requests, "requests")
        self._bodies = BodyRoom(limits.max_body_bytes)
        self._answers = BodyRoom(limits.max_answer_bytes, "large answers")
        self._requests = RequestLog(meter, tracer, [operation.path for operation in api.operations])
        by_name = {operation.name: operation for operation in api.operations}
        self._start, self._get = by_name["startSaga"], by_name["getSaga"]
        self._get_prefix = self._get.path.partition("{")[0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # There are none. Where more came meanwhile, hypercorn has turned it away itself and must not do so again.
            with suppress(h11.LocalProtocolError):
                await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        exchange = AsgiExchange(scope, send, self._requests, self._drain)
        with about(**exchange.log_fields):
            try:
                await self._serve_in_room(exchange, receive)
            except Exception as error:
                # Ours, wherever it is: told as such, as long as nothing else was.
                if exchange.has_begun:
                    raise
                await exchange.refuse(error)
            finally:
                exchange.tell()

    async def _serve_in_room(self, exchange: AsgiExchange, receive: Receive) -> None:
        if self._room.is_full and exchange.scope["path"] not in PROBED:
            # At once, without reading what else comes: there is no room for that either.
            await exchange.refuse(self._room.refusal(), closes=True)
            return
        self._room.taken += 1
        try:
            with self._answers.body() as has:
                await self._serve(exchange, receive, sending_within(exchange, has))
        finally:
            self._room.give()

    async def _serve(self, exchange: AsgiExchange, receive: Receive, send: Send) -> None:
        try:
            body = await self._let_in(exchange.scope, exchange.headers, receive)
        except ClientGone:
            return
        except Unread as unread:
            await exchange.refuse(unread.reason, closes=True)
            return
        except (RequestError, Unavailable) as error:
            await exchange.refuse(error)
            return
        answered_here = self._answered_here(exchange.scope)
        if answered_here is not None:
            operation, path_values = answered_here
            exchange.scope[ROUTE] = operation.path
            request = request_of(exchange.scope, path_values, exchange.headers, body)
            await send_reply(send, await self._api.answer(operation, request))
            return
        try:
            await self._inner(exchange.scope, _replay(body, receive), send)
        except* QUART_CLIENT_GONE:
            pass  # nobody waits for the answer

    async def _let_in(self, scope: Scope, headers: dict[str, list[str]], receive: Receive) -> bytes:
        """The body of a request that may go on; who it is from is in its scope. `RequestError`, `Unavailable`: it may
        not; as `Unread`: and more of it may come. `ClientGone`."""
        _check_head(headers)
        scope["path"] = _path(scope["path"])
        check_header_count(len(scope["headers"]))
        try:
            scope[PRINCIPAL] = await self._principal(scope["method"], scope["path"], headers)
        except (RequestError, Unavailable) as error:
            # A stranger's body takes no memory; it is read so that the answer arrives (see body.py).
            if not await discard_body(receive):
                raise Unread(error) from None
            raise
        with self._bodies.body() as has:
            return await read_body(receive, self._max_body_bytes, has)

    async def _principal(self, method: str, path: str, headers: dict[str, list[str]]) -> Principal:
        """Who asks the API. Whoever asks for something else is nobody here; the pages see to their own (pages.py)."""
        if self._loopback_names_only and path not in PROBED and not is_to_loopback(headers):
            message = "without access control only what is sent to localhost, 127.0.0.1 or [::1] is answered"
            raise PermissionDenied(message)
        if not path.startswith(BASE):
            return NOBODY
        authorization = single_authorization(headers.get("authorization", ()))
        principal = self._authenticator.recognized(authorization)
        if principal is None:
            principal = await self._authenticator.authenticate(authorization)
        if principal.is_unrestricted and method not in READS and is_from_another_site(headers):
            # A token no browser would send by itself. Without, any page that somebody on this machine looks at could.
            raise PermissionDenied("without access control no page of another site may change anything here")
        return principal

    def _answered_here(self, scope: Scope) -> tuple[Operation, dict[str, str]] | None:
        """The operation that is asked for and what its path says; None: Quart has it."""
        method, path = scope["method"], scope["path"]
        if method == self._start.method and path == self._start.path:
            return self._start, {}
        # A long poll, which a query asks for, must end when its client leaves, which is Quart's to see.
        if method == self._get.method and path.startswith(self._get_prefix) and not scope["query_string"]:
            saga_id = path[len(self._get_prefix) :]
            if saga_id and "/" not in saga_id:
                return self._get, {"saga_id": saga_id}
        return None


def _check_head(headers: dict[str, list[str]]) -> None:
    """`Unread`: the request may be another one to somebody in front of us. Where it ends is told in two ways, or its
    host is none."""
    if "transfer-encoding" in headers and "content-length" in headers:
        _refuse_head("Content-Length", "expected a length or chunks, got both")
    if not HOST.fullmatch(headers.get("host", [""])[0]):
        _refuse_head("Host", "expected a host, and a port if any")


def _refuse_head(header: str, message: str) -> NoReturn:
    raise Unread(Invalid(f"{header}: {message}", (Detail(field=header, reason="malformed", message=message),)))


def _path(target: str) -> str:
    """The path of a request's target, which may be a whole URL: what is decided by it must be what is routed by it, and
    slashes at its beginning are routed as one. `Invalid`: it is no URL."""
    if target.startswith("/"):
        return f"/{target.lstrip('/')}" if target.startswith("//") else target
    try:
        parts = urlsplit(target)
    except ValueError:
        message = "expected a path or a URL as the target of the request"
        raise Invalid(message, (Detail(field="", reason="malformed", message=message),)) from None
    return (parts.path or "/") if parts.scheme else target


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it: the client's leaving."""
    given = False

    async def replayed() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
