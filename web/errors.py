"""What an error becomes over HTTP: its status, and the one envelope every error is told in (spec section 4).

Errors of `saga.errors` are told by their text; any other is our own bug, is logged, and is told as a plain 500.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from saga.error_codes import ERROR_CODES, INTERNAL_MESSAGE, RETRY_AFTER_SECS, told_text
from saga.errors import Detail, Invalid, MissingToken, PermissionDenied, Unauthenticated, Unavailable

CHALLENGE = 'Bearer realm="saga"'


class MethodNotAllowed(Exception):
    """The path is known, the method is not; `allowed` are those that are."""

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        self.allowed = sorted(allowed)
        super().__init__(f"method {method} is not allowed here; allowed: {', '.join(self.allowed)}")


STATUS: dict[type[Exception], tuple[int, str]] = {
    **{error: (told.http_status, told.code) for error, told in ERROR_CODES.items()},
    MethodNotAllowed: (405, ERROR_CODES[Invalid].code),
}
"""Status and code by error, as `saga.error_codes` says, and the one error that only this door knows."""


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One field at fault; `line` and `column` where it came from a workflow's text."""

    field: Annotated[str, Meta(description="its path, as `steps[1].retry.max_attempts`; empty: the whole")]
    reason: Annotated[str, Meta(description="a fixed word, for programs")]
    message: Annotated[str, Meta(description="for people")]
    line: Annotated[int, Meta(ge=1, description="from 1")] | msgspec.UnsetType = msgspec.UNSET
    column: Annotated[int, Meta(ge=1, description="from 1")] | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong."""

    code: Annotated[
        str, Meta(description="for programs", extra_json_schema={"enum": sorted({code for _, code in STATUS.values()})})
    ]
    message: Annotated[str, Meta(description="for people")]
    request_id: Annotated[str, Meta(description="the id of the request; it is in the log too")]
    details: Annotated[list[ErrorDetail], Meta(description="each field at fault; none: it is not about fields")]


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """Every error of this API."""

    error: ErrorBody


def status_of(error: Exception) -> tuple[int, str]:
    """HTTP status and code of an error."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def envelope(error: Exception, request_id: str) -> bytes:
    """The JSON a client gets for `error`."""
    status, code = status_of(error)
    details = error.details if isinstance(error, Invalid) else ()
    return msgspec.json.encode(
        ErrorEnvelope(
            error=ErrorBody(
                code=code,
                message=INTERNAL_MESSAGE if status == 500 else told_text(error),
                request_id=request_id,
                details=[_detail(detail) for detail in details],
            )
        )
    )


def headers_of(error: Exception) -> dict[str, str]:
    """Headers that belong to an error beside its envelope."""
    if isinstance(error, MethodNotAllowed):
        return {"Allow": ", ".join(error.allowed)}
    if isinstance(error, Unavailable):
        return {"Retry-After": str(RETRY_AFTER_SECS)}
    if isinstance(error, MissingToken):
        # RFC 6750: without a token no error code, only how one is to be sent.
        return {"WWW-Authenticate": CHALLENGE}
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": f'{CHALLENGE}, error="invalid_token", error_description="{error}"'}
    if isinstance(error, PermissionDenied):
        return {"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope", error_description="{error}"'}
    return {}


def _detail(detail: Detail) -> ErrorDetail:
    return ErrorDetail(
        field=detail.field,
        reason=detail.reason,
        message=detail.message,
        line=msgspec.UNSET if detail.line is None else detail.line,
        column=msgspec.UNSET if detail.column is None else detail.column,
    )
