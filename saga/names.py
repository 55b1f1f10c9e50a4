"""Names that clients give: of workflows, correlation ids, keys, and who it was."""

from __future__ import annotations

from saga.errors import Detail

MAX_NAME = 255
"""Characters: the width of the columns."""


def check_name(details: list[Detail], field: str, name: str) -> None:
    """Adds to `details` what is wrong with it."""
    if not 1 <= len(name) <= MAX_NAME:
        details.append(Detail(field=field, reason="length", message=f"expected 1 to {MAX_NAME} characters"))
    elif not name.isprintable():
        details.append(Detail(field=field, reason="characters", message="expected printable characters"))
