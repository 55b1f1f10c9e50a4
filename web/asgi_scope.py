"""What an ASGI scope says of a request: what came, and what we have found out about it on its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web.exchange import Request

REQUEST_ID = "saga.request_id"
ROUTE = "saga.route"
SPAN = "saga.span"
PRINCIPAL = "saga.principal"
"""Our keys: the id of the request, its span if one is kept, who it is from, and, set by whoever answers, the pattern of
its path."""


def client_of(scope: Mapping[str, Any]) -> str | None:
    """The address at the other end of the connection."""
    client = scope.get("client")
    return client[0] if client else None


def headers_by_name(scope: Mapping[str, Any]) -> dict[str, list[str]]:
    """The headers by lower-case name, each with its values in the order they came."""
    by_name: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        by_name.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return by_name


def request_of(
    scope: Mapping[str, Any], path_values: Mapping[str, str], headers: Mapping[str, list[str]], body: bytes
) -> Request:
    """The request, as an operation takes it. The door has let it in."""
    return Request(
        method=scope["method"],
        path=scope["path"],
        path_values=path_values,
        query=scope["query_string"],
        headers=headers,
        body=body,
        request_id=scope[REQUEST_ID],
        principal=scope[PRINCIPAL],
        address=client_of(scope),
        span=scope[SPAN],
    )
