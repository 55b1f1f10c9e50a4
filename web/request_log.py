"""What is told of each HTTP request when it has been answered: its line in the log, its count, and its span."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

from saga.access import NOBODY, Principal
from saga.meter import Meter
from saga.request_span import RequestSpan
from saga.tracing import Attribute, Tracer
from web.asgi_scope import PRINCIPAL, REQUEST_ID, ROUTE, SPAN, client_of
from web.shield_last import Scope

log = logging.getLogger("saga.web")

PROBED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes that machines ask all day; their lines would bury the others."""


class RequestLog:
    """Of one door. `routes`: the patterns of its paths, with names in braces."""

    def __init__(self, meter: Meter, tracer: Tracer, routes: Iterable[str]) -> None:
        self._meter = meter
        self._tracer = tracer
        self._routes = {route: re.compile(re.sub(r"{\w+}", "[^/]+", route)) for route in routes}

    def span(self, traceparent: str | None, tracestate: Sequence[str]) -> RequestSpan | None:
        """The span of a request that has just come, from what its headers say; None: none are kept."""
        return RequestSpan(self._tracer, traceparent, ",".join(tracestate)) if self._tracer.enabled else None

    def tell(self, scope: Scope, status: int, seconds: float) -> None:
        """The request was answered with `status`, so many seconds after it came."""
        route = scope.get(ROUTE) or self._route_of(scope["path"])
        self._meter.http_request_served(scope["method"], route, status, seconds)
        level = logging.DEBUG if route in PROBED else logging.INFO
        if log.isEnabledFor(level):
            principal: Principal = scope.get(PRINCIPAL, NOBODY)
            log.log(
                level,
                "http_request method=%s route=%s path=%s status=%d ms=%.1f peer=%s principal=%s request_id=%s",
                *(scope["method"], route, scope["raw_path"].decode("ascii", "backslashreplace"), status),
                *(seconds * 1000, client_of(scope)),
                *(principal.subject if principal.is_identified else None, scope[REQUEST_ID]),
            )
        if scope[SPAN] is not None:
            _end_span(scope[SPAN], scope, status, seconds)

    def _route_of(self, path: str) -> str:
        """The pattern of a path that was refused before it was routed."""
        return next((route for route, pattern in self._routes.items() if pattern.fullmatch(path)), "none")


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
