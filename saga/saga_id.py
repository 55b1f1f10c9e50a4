"""The one form an id of a saga has: at every door, in every table, as the key of whoever watches it."""

from __future__ import annotations

import re

PATTERN = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_UUID = re.compile(PATTERN)


def canonical_saga_id(text: str) -> str | None:
    """The id as it is stored, a UUID in lower case; None where no saga can have it. Braces, URNs, bare digits and
    hyphens elsewhere, which Python's own UUID would take, are not ids here."""
    return text.lower() if _UUID.fullmatch(text) else None
