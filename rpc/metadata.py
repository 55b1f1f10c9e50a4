"""The metadata of an attempt (spec section 3): what a participant learns beside the request, and how it is written.

HTTP/2 carries printable ASCII only. A value with anything else in it is percent-encoded the way gRPC encodes
`grpc-message`: UTF-8 bytes outside 0x20-0x7E, the percent sign itself, and blanks at either end become %XX. A
participant that wants the original decodes every `%XX`; plain ASCII names without "%" arrive as they are.
"""

from __future__ import annotations

import math
from urllib.parse import quote

from saga.ports import StepCall

_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

MAX_VALUE_BYTES = 1_000
"""What is left of one encoded value. Servers refuse headers over 8 KiB in all (grpcio's default), and three free texts
are among ours; 255 characters of most scripts fit."""


def encode_value(text: str) -> str:
    """`text` as a metadata value: never more than `MAX_VALUE_BYTES`, never a line break or NUL."""
    if text.isascii() and text.isprintable() and "%" not in text and text.strip(" ") == text:
        return text[:MAX_VALUE_BYTES]
    stripped = text.strip(" ")
    start = "%20" * (len(text) - len(text.lstrip(" ")))
    end = "%20" * (len(text.lstrip(" ")) - len(stripped))
    encoded = start + quote(stripped, safe=_PLAIN, encoding="utf-8", errors="replace") + end
    if len(encoded) <= MAX_VALUE_BYTES:
        return encoded
    cut = encoded[:MAX_VALUE_BYTES]
    # Not in the middle of %XX; a character cut in two decodes to U+FFFD on the other side, which is honest.
    head, mark, tail = cut.rpartition("%")
    return head if mark and len(tail) < 2 else cut


def metadata_of(call: StepCall) -> list[tuple[str, str]]:
    """The metadata of this attempt, in wire form."""
    headers = [
        ("saga-id", encode_value(call.saga_id)),
        ("saga-workflow", encode_value(call.workflow_name)),
        ("saga-step", encode_value(call.step_name)),
        ("saga-action", call.action.value.lower()),
        ("saga-attempt", str(call.attempt)),
        ("saga-epoch", str(call.epoch)),
        ("idempotency-key", encode_value(call.idempotency_key)),
    ]
    if call.correlation_id:
        headers.append(("x-correlation-id", encode_value(call.correlation_id)))
    if call.traceparent:
        headers.append(("traceparent", encode_value(call.traceparent)))
        if call.tracestate:
            headers.append(("tracestate", call.tracestate))  # printable ASCII, or it would not have been kept
    return headers


_MOST_DIGITS = 99_999_999
"""`grpc-timeout` is at most eight digits and a unit."""


def encode_timeout(seconds: float) -> str:
    """`grpc-timeout` for so many seconds: milliseconds while they fit (27 hours), then seconds. Rounded up, since the
    deadline that counts is ours; at least 1 ms."""
    milliseconds = math.ceil(min(seconds, _MOST_DIGITS) * 1000)
    if milliseconds <= _MOST_DIGITS:
        return f"{max(milliseconds, 1)}m"
    return f"{min(math.ceil(seconds), _MOST_DIGITS)}S" if math.isfinite(seconds) else f"{_MOST_DIGITS}S"
