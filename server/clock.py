"""The wall clock of a real process."""

from __future__ import annotations

from datetime import UTC, datetime


class WallClock:
    """`saga.ports.Clock` by the operating system's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)
