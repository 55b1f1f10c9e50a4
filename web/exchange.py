"""One request and its reply as plain values, so that an operation knows neither Quart nor ASGI."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from saga.access import Principal
from saga.audit import Door, Requester, requester
from saga.names import given_once
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
        return given_once(name, self.headers.get(name.lower(), ()))


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What is answered."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = {}
