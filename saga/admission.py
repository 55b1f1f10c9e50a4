"""Whether another saga may be started now: the store's slowness is told to those who come, instead of being piled up.

A start that has gone to the store cannot be called back, since nobody would know whether it was stored; so who waits
goes on waiting, and who comes is turned away before anything was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from saga.errors import Overloaded
from saga.meter import Meter

MAX_STARTS = 2000
"""Starts on their way to the store. A guess: some batches of a group commit, and a second's worth of a fast store."""

STALLED_SECS = 5.0
"""How long the oldest of them may have waited. A guess: far above the slowest commit of a store that is well, and below
the time most clients give a request."""


TOO_MANY, STALLED = REASONS = ("too_many", "stalled")
"""Why a start is turned away, in one word; what the client is told is longer."""


class Admission:
    """The starts under way. More are `Overloaded` when there are `max_starts` of them, or when the one that has waited
    longest has done so for `stalled_secs`."""

    def __init__(self, max_starts: int = MAX_STARTS, stalled_secs: float = STALLED_SECS) -> None:
        self._max_starts = max_starts
        self._stalled_secs = stalled_secs
        self._since: dict[object, float] = {}
        """Oldest first: a dict keeps the order in which its keys came."""

    def __len__(self) -> int:
        return len(self._since)

    @contextmanager
    def start(self, meter: Meter) -> Iterator[None]:
        """A start is under way for as long as the block lasts. `Overloaded`: nothing was begun; `meter` is told."""
        now = trio.current_time()
        if len(self._since) >= self._max_starts:
            meter.start_refused(TOO_MANY)
            raise Overloaded("too many sagas are being started at a time; nothing was started, try again")
        if self._since and now - next(iter(self._since.values())) >= self._stalled_secs:
            meter.start_refused(STALLED)
            raise Overloaded("the store takes too long for the starts that wait; nothing was started, try again")
        place = object()
        self._since[place] = now
        try:
            yield
        finally:
            del self._since[place]
