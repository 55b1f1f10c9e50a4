"""What each error is on the wire, for both doors: one table.

The doors know how an answer of theirs is written; which code and status it has, how long to wait before the next try,
and what is told of our own bugs, is said here. gRPC's statuses are names, so that nothing of gRPC is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from saga.errors import (
    BrokenRule,
    Conflict,
    Invalid,
    LeaseLost,
    MappingFailed,
    MissingToken,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    RowRejected,
    TokenExpired,
    TokenInvalid,
    Unavailable,
    WorkflowInvalid,
)

INTERNAL_MESSAGE = "internal error"
"""All that is told of our own bugs; the log has the rest."""

RETRY_AFTER_SECS = 1
"""What a client is asked to wait where the same may succeed later. A guess: about what a restart of the store takes."""


class OnTheWire(msgspec.Struct, frozen=True):
    """The code a program looks at, and the status of the answer at each door."""

    code: str
    http_status: int
    grpc_status: str


_VALIDATION = OnTheWire("SYS_SAGA_VALIDATION_ERROR", 400, "INVALID_ARGUMENT")
_OUR_BUG = OnTheWire("SYS_SAGA_INTERNAL_ERROR", 500, "INTERNAL")

ERROR_CODES: Mapping[type[Exception], OnTheWire] = {
    NotFound: OnTheWire("SYS_SAGA_NOT_FOUND", 404, "NOT_FOUND"),
    Invalid: _VALIDATION,
    WorkflowInvalid: _VALIDATION,
    PayloadTooLarge: OnTheWire("SYS_SAGA_PAYLOAD_TOO_LARGE", 413, "RESOURCE_EXHAUSTED"),
    Conflict: OnTheWire("SYS_SAGA_CONFLICT", 409, "FAILED_PRECONDITION"),
    MissingToken: OnTheWire("SYS_AUTH_MISSING_TOKEN", 401, "UNAUTHENTICATED"),
    TokenInvalid: OnTheWire("SYS_AUTH_TOKEN_INVALID", 401, "UNAUTHENTICATED"),
    TokenExpired: OnTheWire("SYS_AUTH_TOKEN_EXPIRED", 401, "UNAUTHENTICATED"),
    PermissionDenied: OnTheWire("SYS_AUTH_PERMISSION_DENIED", 403, "PERMISSION_DENIED"),
    Unavailable: OnTheWire("SYS_SAGA_UNAVAILABLE", 503, "UNAVAILABLE"),
    # Not 429: that would blame this client for the load of all of them.
    Overloaded: OnTheWire("SYS_SAGA_UNAVAILABLE", 503, "RESOURCE_EXHAUSTED"),
    # The engine deals with these; one that reaches a client is a mistake of ours.
    MappingFailed: _OUR_BUG,
    LeaseLost: _OUR_BUG,
    RowRejected: _OUR_BUG,
    BrokenRule: _OUR_BUG,
    Exception: _OUR_BUG,
}
"""By error; a class that is not named here is what its nearest base is."""


def told_text(error: Exception) -> str:
    """The words a caller gets for an error that is not our own bug."""
    return error.told if isinstance(error, Unavailable) else str(error)
