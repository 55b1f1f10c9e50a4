"""What an error becomes on the wire of our gRPC server: its status, and the details that go with it.

Only the errors of `saga.errors` and of this file are told to a client by their text; any other is our own bug, is
logged, and is told as INTERNAL.
"""

from __future__ import annotations

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpclib.const import Status

from saga.error_codes import ERROR_CODES, INTERNAL_MESSAGE, RETRY_AFTER_SECS, told_text
from saga.errors import Invalid, Unavailable

DOMAIN = "saga"


class CompressedMessage(Exception):
    """The client compressed its message; grpclib has no decompressor, and we declare none."""


class ShuttingDown(Unavailable):
    """The server stops; what was asked for can be asked of another worker."""


STATUS: dict[type[Exception], tuple[Status, str]] = {
    **{error: (Status[told.grpc_status], told.code) for error, told in ERROR_CODES.items()},
    CompressedMessage: (Status.UNIMPLEMENTED, ERROR_CODES[Invalid].code),
}
"""Status and reason by error, as `saga.error_codes` says, and the one error that only this door knows."""


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
    if isinstance(error, Unavailable):
        details.append(RetryInfo(retry_delay=Duration(seconds=RETRY_AFTER_SECS)))
    return Failure(
        status=status,
        # It goes into a header, and HTTP/2 forbids blanks at the ends of those: a strict client ends its connection.
        message=INTERNAL_MESSAGE if status is Status.INTERNAL else told_text(error).strip(),
        details=details,
    )
