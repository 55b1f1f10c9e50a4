"""Work that many callers wait for and that runs once: opening a connection, asking a participant for its methods."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import trio

from bridge import running_loop

T = TypeVar("T")


class RunCancelled(Exception):
    """The owner gave the run up (it is closing)."""


class SingleFlight(Generic[T]):
    """Runs an asyncio coroutine in a task of its own and lets every caller that comes meanwhile wait for it.

    No caller owns the run: one that is cancelled, or out of time, leaves without disturbing the others. The coroutine
    therefore bounds itself. `runs` counts the runs that are over; `failure` is what the last one raised.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]], on_end: Callable[[], None] | None = None) -> None:
        self._work = work
        self._on_end = on_end
        self._task: asyncio.Task[T] | None = None
        self._over = trio.Event()
        self.runs = 0
        self.failure: Exception | None = None

    def start(self) -> asyncio.Task[T]:
        """Starts a run unless one is under way."""
        if self._task is None:
            self._over = trio.Event()
            self._task = running_loop().create_task(self._work())
            self._task.add_done_callback(self._finish)
        return self._task

    def _finish(self, task: asyncio.Task[T]) -> None:
        self._task = None
        self.runs += 1
        error = RunCancelled() if task.cancelled() else task.exception()
        self.failure = error if isinstance(error, Exception) else None
        self._over.set()
        if self._on_end is not None:
            self._on_end()

    async def result(self) -> T:
        """The result of the run under way, or of a new one. Raises what it raised, or `RunCancelled`."""
        task, over = self.start(), self._over
        await over.wait()
        if task.cancelled():
            raise RunCancelled
        return task.result()

    def cancel(self) -> None:
        """Ends the run under way."""
        if self._task is not None:
            self._task.cancel()
