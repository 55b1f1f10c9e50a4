"""What became of an attempt, told from what came back over the wire: tables, and the one exception that carries a row.

Two questions are kept apart everywhere below. Did the participant say "no" (REFUSED), or do we not know (UNKNOWN)?
And did the call leave this process at all (else NOT_DONE)? Nothing here does I/O.
"""

from __future__ import annotations

import re
import socket
import ssl

from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from h2.errors import ErrorCodes

from saga.ports import Outcome

OUTCOME_OF_STATUS: dict[Status, Outcome] = {
    Status.OK: Outcome.DONE,
    # These five say that somebody gave up waiting or broke on the way, and not whether the work was done before that.
    Status.CANCELLED: Outcome.UNKNOWN,
    Status.UNKNOWN: Outcome.UNKNOWN,
    Status.DEADLINE_EXCEEDED: Outcome.UNKNOWN,
    Status.INTERNAL: Outcome.UNKNOWN,
    Status.UNAVAILABLE: Outcome.UNKNOWN,
    # The participant decided.
    Status.INVALID_ARGUMENT: Outcome.REFUSED,
    Status.NOT_FOUND: Outcome.REFUSED,
    Status.ALREADY_EXISTS: Outcome.REFUSED,
    Status.PERMISSION_DENIED: Outcome.REFUSED,
    Status.RESOURCE_EXHAUSTED: Outcome.REFUSED,
    Status.FAILED_PRECONDITION: Outcome.REFUSED,
    Status.ABORTED: Outcome.REFUSED,
    Status.OUT_OF_RANGE: Outcome.REFUSED,
    Status.UNIMPLEMENTED: Outcome.REFUSED,
    Status.DATA_LOSS: Outcome.REFUSED,
    Status.UNAUTHENTICATED: Outcome.REFUSED,
}

STATUS_OF_HTTP: dict[str, Status] = {
    # The mapping the gRPC project publishes for answers that come from a proxy and carry no gRPC status.
    "400": Status.INTERNAL,
    "401": Status.UNAUTHENTICATED,
    "403": Status.PERMISSION_DENIED,
    "404": Status.UNIMPLEMENTED,
    "429": Status.UNAVAILABLE,
    "502": Status.UNAVAILABLE,
    "503": Status.UNAVAILABLE,
    "504": Status.UNAVAILABLE,
}
"""Any other HTTP status is `UNKNOWN`."""

OUTCOME_OF_RESET: dict[ErrorCodes, tuple[Outcome, str]] = {
    # HTTP/2 promises for REFUSED_STREAM alone that nothing was processed; the codes are the gRPC project's mapping.
    ErrorCodes.REFUSED_STREAM: (Outcome.NOT_DONE, "UNAVAILABLE"),
    ErrorCodes.CANCEL: (Outcome.UNKNOWN, "CANCELLED"),
    ErrorCodes.NO_ERROR: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.PROTOCOL_ERROR: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.INTERNAL_ERROR: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.FLOW_CONTROL_ERROR: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.SETTINGS_TIMEOUT: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.STREAM_CLOSED: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.FRAME_SIZE_ERROR: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.COMPRESSION_ERROR: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.CONNECT_ERROR: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.HTTP_1_1_REQUIRED: (Outcome.UNKNOWN, "INTERNAL"),
    ErrorCodes.ENHANCE_YOUR_CALM: (Outcome.UNKNOWN, "UNAVAILABLE"),
    ErrorCodes.INADEQUATE_SECURITY: (Outcome.UNKNOWN, "UNAVAILABLE"),
}
"""How a stream that the peer reset ends; a code that is not listed is `UNKNOWN`, `INTERNAL`."""

CODE_OF_FAILURE: tuple[tuple[type[Exception], str], ...] = (
    # Failures before the call left (connecting, TLS, looking up the method): NOT_DONE all of them. First match counts.
    (ssl.SSLError, "UNAVAILABLE"),
    (socket.gaierror, "UNAVAILABLE"),
    (TimeoutError, "UNAVAILABLE"),
    (OSError, "UNAVAILABLE"),
    (StreamTerminatedError, "UNAVAILABLE"),
    (ProtocolError, "INTERNAL"),
    (GRPCError, "UNAVAILABLE"),
)


class Lost(Exception):
    """The attempt ended without a status from the participant. Never leaves `rpc/`: it becomes an `Answer`.

    `code` is a gRPC code name; `permanent` as in `saga.ports.Answer`.
    """

    def __init__(self, outcome: Outcome, code: str, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.code = code
        self.message = message
        self.permanent = permanent


def not_done(code: str, message: str, *, permanent: bool = False) -> Lost:
    """The call never left, or could not be built."""
    return Lost(Outcome.NOT_DONE, code, message, permanent=permanent)


def in_doubt(code: str, message: str, *, permanent: bool = False) -> Lost:
    """The call left and what it did is not known."""
    return Lost(Outcome.UNKNOWN, code, message, permanent=permanent)


def lost_by_reset(code: ErrorCodes | int | None) -> Lost:
    """The peer reset the stream with this HTTP/2 error code."""
    try:
        known = ErrorCodes(code) if code is not None else None
    except ValueError:
        known = None
    outcome, name = (Outcome.UNKNOWN, "INTERNAL") if known is None else OUTCOME_OF_RESET[known]
    shown = str(code) if known is None else known.name
    return Lost(outcome, name, f"the participant reset the stream ({shown})")


def failed_before_leaving(error: Exception, doing: str) -> Lost:
    """`error` came up while `doing` ("connecting to …"), before anything of the call was sent."""
    for kind, code in CODE_OF_FAILURE:
        if isinstance(error, kind):
            return not_done(code, f"{doing}: {_describe(error)}")
    return not_done("INTERNAL", f"{doing}: {_describe(error)}")


def closed_after_handshake(cause: Exception | None) -> ConnectionError:
    """For a TLS connection the peer ended before it said a word: with TLS 1.3 a client learns only then that the
    certificate it has shown, or has not, is not accepted. Few servers say that it is that."""
    told = f" ({_describe(cause)})" if isinstance(cause, ssl.SSLError) else ""
    wants = "does it want a client certificate, or another one?"
    return ConnectionError(f"it closed the connection right after the TLS handshake{told}; {wants}")


NO_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"}
)
"""What OpenSSL, by its version, makes of bytes that are no TLS."""


def _describe(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason: str = getattr(error, "reason", None) or str(error)  # only those OpenSSL has raised have one
        words = reason.replace("_", " ").lower()
        return f"TLS: it does not speak TLS ({words})" if reason in NO_TLS else f"TLS: {words}"
    if isinstance(error, GRPCError):
        return f"{error.status.name}: {error.message or 'no message'}"
    if isinstance(error, TimeoutError) and not str(error):
        return "timed out"
    return str(error) or type(error).__name__


MAX_MESSAGE_CHARS = 2_000
"""How much of a participant's own words is kept; enough for a stack trace's head, little enough for a log line."""


_WHITE = re.compile("[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]+")
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def clean_text(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """`text` made fit to be stored, logged and shown: a run of tabs and line breaks is one blank, other control
    characters and lone surrogates become U+FFFD (Postgres cannot store a NUL), over `limit` it is cut with "…"."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    if text.isprintable():
        return text
    return _UNFIT.sub("\ufffd", _WHITE.sub(" ", text))
