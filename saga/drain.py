"""The moment a process begins to stop, told to those who would otherwise keep it waiting: long polls and watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Drain:
    """Begins once. One for a process, shared by its front doors."""

    def __init__(self) -> None:
        self._begun = trio.Event()
        self._cut_short: set[trio.CancelScope] = set()

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        """Ends every block under `ends_early` now and all later ones at their first checkpoint."""
        self._begun.set()
        for scope in self._cut_short:
            scope.cancel()

    async def wait(self) -> None:
        """Returns when the drain has begun."""
        await self._begun.wait()

    @contextmanager
    def ends_early(self) -> Iterator[trio.CancelScope]:
        """A block that may wait long and must not hold up a stop; `cancelled_caught` says whether it was cut short."""
        with trio.CancelScope() as scope:
            self._cut_short.add(scope)
            if self.begun:
                scope.cancel()
            try:
                yield scope
            finally:
                self._cut_short.discard(scope)
