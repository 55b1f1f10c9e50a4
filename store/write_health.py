"""Whether the database takes writes, by what became of the last ones.

A database whose disk is full, or that has become read-only, still answers every read. Trying a write at each question
would be a load of its own and might even succeed (a row that is changed in place needs no room), so the real writes are
watched. A failure counts until the same way has been gone with success, or for `FAILED_FOR_SECS`: a server that is
taken out of a load balancer for it may get no write to be proved well by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from saga.errors import Unavailable

FAILED_FOR_SECS = 10.0
"""Twice the longest pause between a stalled saga's tries, so that a database that takes none of them stays unwell."""


class WriteHealth:
    """One way of writing: a connection, or a lane. `counts`: which failures say something about the next write."""

    def __init__(self, counts: Callable[[Unavailable], bool] = lambda error: True) -> None:
        self._counts = counts
        self._failed_at: float | None = None
        self._reason = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A write, to be noted by how it ends. A row that is refused for its content proves the database well."""
        try:
            yield
        except Unavailable as error:
            if self._counts(error):
                self._failed_at, self._reason = time.monotonic(), str(error)
            raise
        except Exception:
            self._failed_at = None
            raise
        self._failed_at = None

    def check(self) -> None:
        """Raises `Unavailable` while the last write failed and is not long ago."""
        if self._failed_at is not None and time.monotonic() - self._failed_at < FAILED_FOR_SECS:
            raise Unavailable("the last write failed", self._reason)
