"""One request and its reply as plain values, so that an operation knows neither Quart nor ASGI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from saga.access import Principal
from saga.audit import Door, Requester, requester
from saga.errors import Detail, Invalid
from saga.request_span import RequestSpan

JSON = "application/json"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked. `headers` has lower-case names, each with its values in the order they came.
    `address`: the peer of the connection, which is a proxy where there is one. `span`: None where none is kept."""

    method: str
    path: str
    path_values: Mapping[str, str]
    query: bytes
    headers: Mapping[str, list[str]]
    body: bytes
    request_id: str
    principal: Principal
    address: str | None = None
    span: RequestSpan | None = None

    @property
    def asked_by(self) -> Requester:
        """Who asks, for the audit log."""
        return requester(self.principal, Door.REST, address=self.address, request_id=self.request_id)

    def header(self, name: str) -> str | None:
        """The value of a header that may be given once. `Invalid`: it is repeated."""
        values = self.headers.get(name.lower())
        if values is None:
            return None
        if len(values) > 1:
            detail = Detail(field=name, reason="repeated", message="given more than once")
            raise Invalid(f"{name}: {detail.message}", (detail,))
        return values[0]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What is answered."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = {}


def peer_of(scope: Mapping[str, Any]) -> str | None:
    """The address at the other end of the connection that an ASGI scope came over."""
    client = scope.get("client")
    return client[0] if client else None


def headers_by_name(pairs: list[tuple[bytes, bytes]]) -> dict[str, list[str]]:
    """ASGI's header pairs by lower-case name."""
    by_name: dict[str, list[str]] = {}
    for name, value in pairs:
        by_name.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return by_name


def is_from_another_site(headers: Mapping[str, list[str]]) -> bool:
    """Whether a page of another site had a browser send this. Every browser of today tells: over TLS and to loopback
    what it is to this site, and else the origin of the page, where a proxy may have another name for us."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return any(value not in ("same-origin", "none") for value in site)
    ours = {*headers.get("host", ()), *headers.get("x-forwarded-host", ())}
    return origin is not None and any(value.partition("://")[2] not in ours for value in origin)
