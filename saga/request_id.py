"""The id one request is known by in its answer and in the log, the same rule at every door."""

from __future__ import annotations

import uuid

MAX_LENGTH = 128
"""Longer ids are replaced: they are copied into every log line of the request."""


def request_id(sent: str | None) -> str:
    """The caller's id if it is printable ASCII of at most `MAX_LENGTH` characters, else a new one."""
    if sent is not None and 0 < len(sent) <= MAX_LENGTH and sent.isascii() and sent.isprintable():
        return sent
    return str(uuid.uuid4())
