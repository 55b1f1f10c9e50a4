"""What an error becomes on the wire of our gRPC server: one table, and the details that go with a status.

Only the errors of `saga.errors` and of this file are told to a client by their text; any other is our own bug, is
logged, and is told as INTERNAL.
"""

from __future__ import annotations

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpclib.const import Status

from saga.errors import (
    Conflict,
    Invalid,
    MissingToken,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    TokenExpired,
    TokenInvalid,
    Unavailable,
)

DOMAIN = "saga"
INTERNAL_MESSAGE = "internal error"
RETRY_AFTER_SECS = 1
"""What a client is asked to wait when it may try again. A guess, the same as over HTTP."""


class CompressedMessage(Exception):
    """The client compressed its message; grpclib has no decompressor, and we declare none."""


class ShuttingDown(Exception):
    """The server stops; what was asked for can be asked of another worker."""


STATUS: dict[type[Exception], tuple[Status, str]] = {
    NotFound: (Status.NOT_FOUND, "SYS_SAGA_NOT_FOUND"),
    PayloadTooLarge: (Status.RESOURCE_EXHAUSTED, "SYS_SAGA_PAYLOAD_TOO_LARGE"),
    Invalid: (Status.INVALID_ARGUMENT, "SYS_SAGA_VALIDATION_ERROR"),
    Conflict: (Status.FAILED_PRECONDITION, "SYS_SAGA_CONFLICT"),
    MissingToken: (Status.UNAUTHENTICATED, "SYS_AUTH_MISSING_TOKEN"),
    TokenInvalid: (Status.UNAUTHENTICATED, "SYS_AUTH_TOKEN_INVALID"),
    TokenExpired: (Status.UNAUTHENTICATED, "SYS_AUTH_TOKEN_EXPIRED"),
    PermissionDenied: (Status.PERMISSION_DENIED, "SYS_AUTH_PERMISSION_DENIED"),
    Overloaded: (Status.RESOURCE_EXHAUSTED, "SYS_SAGA_UNAVAILABLE"),
    Unavailable: (Status.UNAVAILABLE, "SYS_SAGA_UNAVAILABLE"),
    ShuttingDown: (Status.UNAVAILABLE, "SYS_SAGA_UNAVAILABLE"),
    CompressedMessage: (Status.UNIMPLEMENTED, "SYS_SAGA_VALIDATION_ERROR"),
    Exception: (Status.INTERNAL, "SYS_SAGA_INTERNAL_ERROR"),
}
"""Status and reason (the REST code) by error; a class not named here is what its nearest base is."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What the client is told."""

    status: Status
    message: str
    details: list[Message]


def failure(error: Exception) -> Failure:
    """What `error` is told as: status, text, `ErrorInfo`, `BadRequest` where fields are at fault, and
    `RetryInfo` where the same may succeed later."""
    status, reason = next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    details: list[Message] = [ErrorInfo(reason=reason, domain=DOMAIN)]
    if isinstance(error, Invalid) and error.details:
        details.append(
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(field=detail.field, description=detail.message, reason=detail.reason)
                    for detail in error.details
                ]
            )
        )
    if isinstance(error, Unavailable | ShuttingDown):
        details.append(RetryInfo(retry_delay=Duration(seconds=RETRY_AFTER_SECS)))
    return Failure(
        status=status,
        # It goes into a header, and HTTP/2 forbids blanks at the ends of those: a strict client ends its connection.
        message=INTERNAL_MESSAGE if status is Status.INTERNAL else str(error).strip(),
        details=details,
    )
