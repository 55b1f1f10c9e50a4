"""The HTTP application: the table of `api.py` as routes of Quart-Trio, errors as envelopes, and the `Door` in front."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

import msgspec
import quart
import trio
from quart import Response
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WerkzeugMethodNotAllowed

from saga import audit
from saga.access import Permission
from saga.authentication import Authenticator
from saga.door_limits import DoorLimits
from saga.drain import Drain
from saga.errors import Invalid, NotFound, PermissionDenied, Unavailable
from saga.payload_mask import NOTHING, PayloadMask
from saga.readiness import Readiness
from saga.service import SagaService
from saga.tracing import Tracer
from web.api import Api, Operation, error_reply
from web.asgi_scope import PRINCIPAL, REQUEST_ID, ROUTE, client_of, headers_by_name, request_of
from web.docs_page import add_docs_page
from web.door import Door
from web.errors import MethodNotAllowed
from web.exchange import Reply
from web.metrics import CONTENT_TYPE, PrometheusMeter
from web.openapi import openapi
from web.pages import PAGES, add_pages, error_page
from web.shared_metrics import SharedMetrics
from web.shield_last import shield_last
from web.sign_in import SIGN_IN, add_sign_in

log = logging.getLogger("saga.web")

COUNT_SECS = 2.0
"""How long a scrape waits for the store to count open sagas."""
COUNT_KEPT_SECS = 5.0
"""How long that count is used again, and ten times what it took: anyone may scrape, and it reads indexes from end to
end."""

DOCUMENTS: Mapping[str, Permission] = {
    "openapi_json": Permission.OPEN,
    "docs_page": Permission.OPEN,
    "metrics": Permission.OPEN,
    "static": Permission.OPEN,
}
"""The routes, by endpoint, that are neither operations nor pages (spec section 9)."""


def create_app(
    service: SagaService,
    *,
    authenticator: Authenticator,
    drain: Drain,
    version: str,
    meter: PrometheusMeter | None = None,
    tracer: Tracer | None = None,
    readiness: Readiness | None = None,
    shared_metrics: SharedMetrics | None = None,
    payload_mask: PayloadMask = NOTHING,
    limits: DoorLimits | None = None,
    loopback_names_only: bool = False,
) -> QuartTrio:
    """The application; serve it with `serving.serve_rest`.

    `authenticator`: tells who asks. `drain`: begun by whoever stops the process, ends long polls. Without
    `readiness` and `meter` the application has ones of its own; with `shared_metrics` it tells of other workers' too.
    `payload_mask`: what the pages do not show. `limits`: those of requests and bodies.
    `loopback_names_only`: what is asked of another name than this machine's loopback has is refused.
    """
    meter = meter or PrometheusMeter()
    api = Api(service, drain, readiness or Readiness(service, drain))
    app = QuartTrio("web", static_folder="static", template_folder="templates")
    # A doubled slash is an unknown route, not a redirect; bodies are bounded before they come here.
    app.url_map.merge_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = None
    app.config["RESPONSE_TIMEOUT"] = None
    for operation in api.operations:
        app.add_url_rule(
            operation.path.replace("{saga_id}", "<saga_id>").replace("{name}", "<path:name>"),
            endpoint=operation.name,
            view_func=_view(api, operation),
            methods=[operation.method],
        )
    app.before_request(_note_route)
    access = {operation.name: operation.permission for operation in api.operations}
    add_sign_in(app, authenticator, {**access, **DOCUMENTS, **PAGES, **SIGN_IN}, PAGES)
    _add_documents(app, service, api, meter, shared_metrics, version)
    add_pages(app, service, payload_mask)
    _answer_errors(app, api)
    inner = cast(Any, app.asgi_app)
    door = Door(
        inner,
        api,
        authenticator,
        meter,
        tracer or Tracer(),
        drain,
        service.max_payload_bytes,
        limits or DoorLimits(),
        loopback_names_only=loopback_names_only,
    )
    app.asgi_app = shield_last(door)  # type: ignore[method-assign,assignment]  # Quart's documented way to wrap it
    return app


def _note_route() -> None:
    rule = quart.request.url_rule
    if rule is not None:
        _scope()[ROUTE] = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)


def _view(api: Api, operation: Operation) -> Callable[..., Awaitable[Response]]:
    async def view(**path_values: str) -> Response:
        scope = _scope()
        body = cast(bytes, await quart.request.get_data())
        request = request_of(scope, path_values, headers_by_name(scope), body)
        return _response(await api.answer(operation, request))

    return view


def _add_documents(
    app: QuartTrio,
    service: SagaService,
    api: Api,
    meter: PrometheusMeter,
    shared: SharedMetrics | None,
    version: str,
) -> None:
    """`/openapi.json`, `/docs` and `/metrics`: made, not asked of the service."""
    counted_until = -1.0

    @functools.cache
    def document() -> dict[str, Any]:
        return openapi(api.operations, version)

    @functools.cache
    def encoded() -> bytes:
        return msgspec.json.encode(document())

    @app.get("/openapi.json")
    async def openapi_json() -> Response:
        return _response(Reply(status=200, body=encoded()))

    add_docs_page(app, document)

    @app.get("/metrics")
    async def metrics() -> Response:
        nonlocal counted_until
        asked_at = trio.current_time()
        if asked_at >= counted_until:
            counted_until = asked_at + COUNT_KEPT_SECS  # at once, so that scrapes at the same time count once
            # Without the store the rest is all the more worth having; the old count stays, and its instant tells.
            with trio.move_on_after(COUNT_SECS):
                try:
                    meter.set_store_counts(await service.count_open(), await service.undo_debt())
                except Exception as error:  # noqa: BLE001  # whatever is wrong with the store, a scrape tells the rest
                    level = logging.INFO if isinstance(error, Unavailable) else logging.WARNING
                    log.log(level, "store_not_counted error=%s", error)
            counted_until += 10 * (trio.current_time() - asked_at)
        body = meter.render() if shared is None else await shared.render()
        return _response(Reply(status=200, body=body, content_type=CONTENT_TYPE))


def _answer_errors(app: QuartTrio, api: Api) -> None:
    """Envelopes for what Quart itself refuses, what the guard refuses, and what a handler did not expect."""
    operations = {operation.name: operation for operation in api.operations}

    @app.errorhandler(Exception)
    async def on_error(error: Exception) -> Response:
        scope = _scope()
        told: Exception = error
        if isinstance(error, WerkzeugMethodNotAllowed):
            told = MethodNotAllowed(scope["method"], error.valid_methods or ())
        elif isinstance(error, HTTPException) and error.code == 404:
            told = NotFound("no such route")
        elif isinstance(error, HTTPException) and error.code is not None and error.code < 500:
            told = Invalid(error.description or error.name)
        elif (
            isinstance(error, PermissionDenied)
            and (refused := operations.get(quart.request.endpoint or ""))
            and scope["method"] == refused.method  # Quart answers OPTIONS by itself, and nobody asks for a change by it
        ):
            asked_by = audit.requester(
                scope[PRINCIPAL], audit.Door.REST, address=client_of(scope), request_id=scope[REQUEST_ID]
            )
            await api.note_denied(refused, asked_by, (quart.request.view_args or {}).get("saga_id"))
        reply = error_reply(told, scope[REQUEST_ID])  # which logs it
        if quart.request.endpoint in PAGES and quart.request.method in ("GET", "HEAD"):
            return await error_page(told, scope[REQUEST_ID])
        return _response(reply)


def _scope() -> dict[str, Any]:
    return cast(dict[str, Any], quart.request.scope)


def _response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, {**reply.headers, "Content-Type": reply.content_type})
