"""Instants as the stores write them, and the clock of the machine.

One text form (RFC 3339, UTC, microseconds, `Z`) so that text sorts as time does.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class SystemClock:
    """Wall time of this machine; safe to ask from any thread."""

    def now(self) -> datetime:
        return datetime.now(UTC)


def to_text(instant: datetime) -> str:
    """The text of an aware instant."""
    return instant.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_text(text: str) -> datetime:
    """The instant that `to_text` wrote."""
    return datetime.fromisoformat(text)


def after_secs(text: str, secs: float | None) -> str | None:
    """The instant `secs` seconds after `text`; None for None."""
    return None if secs is None else to_text(from_text(text) + timedelta(seconds=secs))


def seconds_between(earlier: str, later: str | None) -> float | None:
    """Seconds from one instant to another, negative if it came before; None for None."""
    return None if later is None else (from_text(later) - from_text(earlier)).total_seconds()
