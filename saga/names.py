"""Names that clients give: of workflows, correlation ids, keys, and who it was."""

from __future__ import annotations

from collections.abc import Sequence

from saga.errors import Detail, Invalid

MAX_NAME = 255
"""Characters: the width of the columns."""


def check_name(details: list[Detail], field: str, name: str) -> None:
    """Adds to `details` what is wrong with it."""
    if not 1 <= len(name) <= MAX_NAME:
        details.append(Detail(field=field, reason="length", message=f"expected 1 to {MAX_NAME} characters"))
    elif not name.isprintable():
        details.append(Detail(field=field, reason="characters", message="expected printable characters"))


def given_once(name: str, values: Sequence[str]) -> str | None:
    """The value of a header that may be given once, None without any. `Invalid`: it is repeated."""
    if len(values) > 1:
        detail = Detail(field=name, reason="repeated", message="given more than once")
        raise Invalid(f"{name}: {detail.message}", (detail,))
    return values[0] if values else None
