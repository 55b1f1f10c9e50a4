"""What every HTTP request passes before Quart sees it: its id, its body within bounds, its line in the log and metrics.

The two calls a busy client makes all day, starting a saga and reading one, are answered here: Quart's request objects
and nursery cost about as much as the rest of such a call. They run the same operations in the same way; Quart has all
other routes, and these two too when anything about the request is out of the ordinary.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit

import h11
import quart.wrappers.base

from saga.access import NOBODY, Principal, single_authorization
from saga.authentication import Authenticator
from saga.door_limits import BodyRoom, DoorLimits, Room, check_header_count
from saga.drain import Drain
from saga.errors import Detail, Invalid, Overloaded, PermissionDenied, RequestError, Unavailable
from saga.log_fields import about
from saga.meter import Meter
from saga.request_id import request_id
from saga.request_span import RequestSpan
from saga.tracing import Attribute, Tracer, read_traceparent, single_traceparent
from saga.workflow_yaml import MAX_YAML_BYTES
from web.api import BASE, Api, error_reply
from web.body import ClientGone, Unread, discard_body, read_body
from web.exchange import Reply, Request, headers_by_name, is_from_another_site, peer_of
from web.shield_last import Asgi, Receive, Scope, Send

log = logging.getLogger("saga.web")

BODY_SLACK_BYTES = 64 * 1024
"""What a request may have beside its payload."""
WORKFLOW_BODY_BYTES = 2 * MAX_YAML_BYTES
"""The longest workflow as a JSON string with every character escaped by one other, as line ends and quotes are."""

LAST_BYTES = 64 * 1024
"""What may go out with the end of an answer, which `shield_last` gives a short time."""

READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing; what they answer, a browser does not show to pages of other sites."""

PROBED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes that machines ask all day; their lines would bury the others."""

HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
"""What a host, with its port, is made of (RFC 9110, 7.2); empty where the target needs none."""

MAX_LOGGED_PATH = 4096
"""Bytes of a path in its line. The lines are masked afterwards, and half a token would not be known for one."""

GONE = 499
"""The status noted when the client went away before it was answered; nginx's number for it."""

QUART_CLIENT_GONE: type[Exception] = getattr(quart.wrappers.base, "ClientDisconnectedError", ClientGone)
"""What quart raises since 0.23, out of the application, where the client went before its answer. (Below Python 3.13 we
have 0.22, which does not.)"""

REQUEST_ID = "saga.request_id"
ROUTE = "saga.route"
SPAN = "saga.span"
PRINCIPAL = "saga.principal"
"""Keys of the ASGI scope: the id of the request, its span if one is kept, who it is from, and, set by whoever answers,
the pattern of its path."""


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
    ) -> None:
        self._inner = inner
        self._api = api
        self._authenticator = authenticator
        self._meter = meter
        self._tracer = tracer
        self._drain = drain
        self._max_body_bytes = max(max_payload_bytes, WORKFLOW_BODY_BYTES) + BODY_SLACK_BYTES
        self._requests = Room(limits.max_requests, "requests")
        self._bodies = BodyRoom(limits.max_body_bytes)
        self._answers = BodyRoom(limits.max_answer_bytes, "large answers")
        by_name = {operation.name: operation for operation in api.operations}
        self._start, self._get = by_name["startSaga"], by_name["getSaga"]
        self._get_prefix = self._get.path.partition("{")[0]
        self._routes = {
            operation.path: re.compile(re.sub(r"{\w+}", "[^/]+", operation.path)) for operation in api.operations
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            # There are none. Where more came meanwhile, hypercorn has turned it away itself and must not do so again.
            with suppress(h11.LocalProtocolError):
                await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        headers = headers_by_name(scope["headers"])
        known_as = request_id(headers.get("x-request-id", [None])[-1])
        scope[REQUEST_ID] = known_as
        traceparent = single_traceparent(headers.get("traceparent", ()))
        scope[SPAN] = span = None
        if self._tracer.enabled:
            tracestate = ",".join(headers.get("tracestate", ()))
            scope[SPAN] = span = RequestSpan(self._tracer, traceparent, tracestate)
        started = time.perf_counter()
        status = GONE
        noted = False

        def note() -> None:
            nonlocal noted
            if not noted:
                noted = True
                seconds = time.perf_counter() - started
                self._note(scope, status, seconds)
                if span is not None:
                    _end_span(span, scope, status, seconds)

        async def send_noted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", known_as.encode())]
                if self._drain.begun and scope["http_version"] != "2":
                    # A client that polls would otherwise ask this worker again and again to its end.
                    message["headers"].append((b"connection", b"close"))
            elif not message.get("more_body", False):
                note()  # before it is sent: whoever has the answer finds the line, and the count, there
            await send(message)

        refused = False

        async def send_within(message: dict[str, Any]) -> None:
            nonlocal refused
            if refused:
                return
            if message["type"] == "http.response.start":
                try:
                    has(_length(message))
                except Overloaded as error:
                    # What was asked for is done, or was read; whoever asks again finds it so.
                    refused = True
                    await _send(send_noted, error_reply(error, known_as))
                    return
            await send_noted(message)

        caller = read_traceparent(traceparent)
        with about(request_id=known_as, **({} if caller is None else {"trace_id": caller.trace_id})):
            try:
                if self._requests.is_full and scope["path"] not in PROBED:
                    # At once, without reading what else comes: there is no room for that either.
                    closing = {"Connection": "close"} if scope["http_version"] != "2" else {}
                    await _send(send_noted, error_reply(self._requests.refusal(), known_as), closing)
                    return
                self._requests.taken += 1
                try:
                    with self._answers.body() as has:
                        await self._serve(scope, headers, known_as, receive, send_within)
                finally:
                    self._requests.give()
            finally:
                note()

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get(ROUTE) or self._route_of(scope["path"])
        self._meter.http_request_served(scope["method"], route, status, seconds)
        level = logging.DEBUG if route in PROBED else logging.INFO
        if log.isEnabledFor(level):
            principal: Principal = scope.get(PRINCIPAL, NOBODY)
            log.log(
                level,
                "http_request method=%s route=%s path=%s status=%d ms=%.1f peer=%s principal=%s request_id=%s",
                *(scope["method"], route, _printable(scope["raw_path"]), status, seconds * 1000, peer_of(scope)),
                *(principal.subject if principal.is_identified else None, scope[REQUEST_ID]),
            )

    def _route_of(self, path: str) -> str:
        """The pattern of a path that was refused before it was routed."""
        return next((route for route, pattern in self._routes.items() if pattern.fullmatch(path)), "none")

    async def _serve(
        self, scope: Scope, headers: dict[str, list[str]], known_as: str, receive: Receive, send: Send
    ) -> None:
        # HTTP/2 has no such header, and forbids it; there the stream alone ends.
        closing = {"Connection": "close"} if scope["http_version"] != "2" else {}
        try:
            _check_head(headers)
            scope["path"] = _path(scope["path"])
            check_header_count(len(scope["headers"]))
            try:
                principal = scope[PRINCIPAL] = await self._principal(scope["method"], scope["path"], headers)
            except (RequestError, Unavailable) as error:
                # A stranger's body takes no memory; it is read so that the answer arrives (see body.py).
                whole = await discard_body(receive)
                await _send(send, error_reply(error, known_as), {} if whole else closing)
                return
            with self._bodies.body() as has:
                body = await read_body(receive, self._max_body_bytes, has)
        except ClientGone:
            return
        except Unread as unread:
            await _send(send, error_reply(unread.reason, known_as), closing)
            return
        except Invalid as error:
            await _send(send, error_reply(error, known_as))
            return
        path, query = scope["path"], scope["query_string"]
        if scope["method"] == self._start.method and path == self._start.path:
            operation, values = self._start, {}
        elif (
            scope["method"] == self._get.method
            and not query  # a long poll must end when its client leaves, which is Quart's to see
            and path.startswith(self._get_prefix)
            and "/" not in (saga_id := path[len(self._get_prefix) :])
            and saga_id
        ):
            operation, values = self._get, {"saga_id": saga_id}
        else:
            try:
                await self._inner(scope, _replay(body, receive), send)
            except* QUART_CLIENT_GONE:
                pass  # nobody waits for the answer
            return
        scope[ROUTE] = operation.path
        request = Request(
            method=scope["method"],
            path=path,
            path_values=values,
            query=query,
            headers=headers,
            body=body,
            request_id=known_as,
            principal=principal,
            address=peer_of(scope),
            span=scope[SPAN],
        )
        await _send(send, await self._api.answer(operation, request))

    async def _principal(self, method: str, path: str, headers: dict[str, list[str]]) -> Principal:
        """Who asks the API. Whoever asks for something else is nobody here; the pages see to their own (pages.py)."""
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
    """The path of a request's target, which may be a whole URL: what is decided by it must be what is routed by it.
    `Invalid`: it is no URL."""
    if target.startswith("/"):
        return target
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


async def _send(send: Send, reply: Reply, more_headers: dict[str, str] | None = None) -> None:
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


def _length(start: dict[str, Any]) -> int:
    """Of the body that follows the start of an answer; 0: it does not say, and is none of ours."""
    return next((int(value) for name, value in start.get("headers", ()) if name.lower() == b"content-length"), 0)


def _end_span(span: RequestSpan, scope: Scope, status: int, seconds: float) -> None:
    route = scope.get(ROUTE)
    if route in PROBED:
        return
    attributes: dict[str, Attribute] = {
        "http.request.method": scope["method"],
        "http.response.status_code": status,
        "url.scheme": scope["scheme"],
        "saga.request_id": scope[REQUEST_ID],
    }
    if route is not None:
        attributes["http.route"] = route
    name = scope["method"] if route is None else f"{scope['method']} {route}"
    span.end(name, seconds, attributes, f"HTTP {status}" if status >= 500 else None)


def _printable(raw_path: bytes) -> str:
    return raw_path[:MAX_LOGGED_PATH].decode("ascii", "backslashreplace")
