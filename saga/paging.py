"""What a client says of the page it wants: its size, and the cursor of the page before. The same for every list.

A cursor names the last row of a page by what its list is sorted by, newest first: an instant and what tells rows of the
same instant apart. It stays good when others come and go.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from saga.errors import Detail

MAX_PAGE_SIZE = 200

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LONGEST_INSTANT = 17
"""Digits of microseconds: below the year 9999, where datetime ends."""

Row = TypeVar("Row")


def check_page_size(details: list[Detail], page_size: int) -> None:
    """Adds to `details` what is wrong with it."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        message = f"expected int from 1 to {MAX_PAGE_SIZE}"
        details.append(Detail(field="page_size", reason="out_of_range", message=message))


def read_cursor(
    details: list[Detail], cursor: str | None, read_row: Callable[[str], Row | None]
) -> tuple[datetime, Row] | None:
    """Where the page begins; None: at the newest, or nowhere, which is added to `details`. `read_row`: None for what
    names no row."""
    if cursor is None:
        return None
    instant, _, name = cursor.partition("_")
    row = read_row(name)
    if row is None or not (instant.isascii() and instant.isdigit()) or len(instant) > _LONGEST_INSTANT:
        details.append(Detail(field="cursor", reason="malformed", message="not a cursor of this API"))
        return None
    return _EPOCH + int(instant) * _MICROSECOND, row


def write_cursor(key: tuple[datetime, object] | None) -> str | None:
    """The cursor of the page after the one that ends with this row; None: there is none."""
    return None if key is None else f"{(key[0] - _EPOCH) // _MICROSECOND}_{key[1]}"
