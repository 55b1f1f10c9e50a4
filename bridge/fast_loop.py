"""trio-asyncio's loop, made fast: one Trio tick runs all asyncio callbacks that are ready, not one.

The stock loop of trio-asyncio 0.16 spends a Trio tick on every callback, and a Trio task with a one-shot epoll
registration on every file descriptor. `FastLoop` keeps its promises and its shutdown, and replaces the two inner parts:

- `_main_loop` runs what is ready in batches, as asyncio does, and lets Trio go on after `BATCH_SECS`;
- file descriptors are in asyncio's own epoll object, and one Trio task waits for that object to become readable.

It also takes negative delays in `call_later`, as asyncio does (the stock loop asserts), and forgets cancelled timers
before they are due.

It overrides private methods, so it is used with the version it was written for alone; any other version gets its own
stock loop, which is slower and no less correct (`open_fast_loop`). Nothing of trio-asyncio is patched: our `open_loop`
is theirs with another class in the place of `TrioEventLoop`.
"""

from __future__ import annotations

import asyncio
import heapq
import importlib.metadata
import inspect
import logging
import os
import select
import selectors
import types
from asyncio.selector_events import BaseSelectorEventLoop
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context
from time import perf_counter
from typing import Any

import sniffio
import trio
import trio_asyncio  # type: ignore[import-untyped]
from trio_asyncio._async import TrioEventLoop  # type: ignore[import-untyped]
from trio_asyncio._base import TrioAsyncioExit  # type: ignore[import-untyped]
from trio_asyncio._handles import AsyncHandle  # type: ignore[import-untyped]

log = logging.getLogger("saga.bridge")

WRITTEN_FOR = "0.16."
"""The trio-asyncio whose private methods are overridden here."""

BATCH_SECS = 0.001
"""How long callbacks may run before Trio's other tasks get a turn. A guess: far above one callback, far below what a
client notices."""

BATCH_ROUNDS = 16
"""How often a batch takes up the callbacks that its own callbacks have added, before it looks for I/O again."""


class _ReadyQueue:
    """The handles to be run, in the place of the stock loop's memory channel (hence the names of its methods)."""

    __slots__ = ("_sleeper", "handles")

    def __init__(self) -> None:
        self.handles: deque[asyncio.Handle] = deque()
        self._sleeper: trio.lowlevel.Task | None = None

    def send_nowait(self, handle: asyncio.Handle) -> None:
        self.handles.append(handle)
        if self._sleeper is not None:
            self.wake()

    def receive_nowait(self) -> asyncio.Handle:
        if not self.handles:
            raise trio.WouldBlock
        return self.handles.popleft()

    def wake(self) -> None:
        """Ends `sleep`."""
        if self._sleeper is not None:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None

    async def sleep(self) -> None:
        """Returns at the next `wake`; one task at a time."""

        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)


class FastLoop(TrioEventLoop):  # type: ignore[misc]  # untyped library
    """See the head of this file. Made by `open_fast_loop` only."""

    def __init__(self, queue_len: int | None = None) -> None:
        super().__init__(queue_len)
        self._queue = self._q_send = self._q_recv = _ReadyQueue()
        # The stock selector keeps a list for Trio tasks to work on; a real one takes over what is registered (the
        # loop's own wake-up pipe).
        stock: selectors.BaseSelector = self._selector
        self._selector: selectors.EpollSelector = selectors.EpollSelector()
        for key in list(stock.get_map().values()):
            self._selector.register(key.fileobj, key.events, key.data)
        stock.close()
        self._cancelled_timers = 0
        # `_io_ready`: the epoll object was readable and has not been found empty since; `_poller` then waits for that.
        self._io_ready = False
        self._poller: trio.lowlevel.Task | None = None

    # --- callbacks and timers ---

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        self._check_closed()
        if self.get_debug():
            self._check_callback(callback, "call_soon")
        handle = asyncio.Handle(callback, args, self, context)
        self._queue.send_nowait(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle: asyncio.TimerHandle = self.call_at(self.time() + delay, callback, *args, context=context)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        # Most timeouts are cancelled long before they are due; asyncio forgets them by the same rule.
        self._cancelled_timers += 1
        if self._cancelled_timers > 100 and self._cancelled_timers * 2 > len(self._timers):
            self._timers[:] = [timer for timer in self._timers if not timer.cancelled()]
            heapq.heapify(self._timers)
            self._cancelled_timers = 0

    def _add_callback(self, handle: asyncio.Handle, _via_token: bool = False) -> None:
        if not handle.cancelled():
            self._queue.handles.append(handle)

    # --- file descriptors: asyncio's own bookkeeping, which the stock loop had replaced ---

    _add_reader = BaseSelectorEventLoop._add_reader  # type: ignore[attr-defined]
    _add_writer = BaseSelectorEventLoop._add_writer  # type: ignore[attr-defined]

    def _cancel_fds(self) -> None:
        for key in list(self._selector.get_map().values()):
            for handle in key.data:
                if handle is not None:
                    handle.cancel()
            if key.fd in self._close_files:
                os.close(key.fd)

    async def _wait_for_io(self) -> None:
        """Tells the main loop when there is I/O, then waits until it has dealt with all of it."""

        def abort(_: object) -> trio.lowlevel.Abort:
            self._poller = None
            return trio.lowlevel.Abort.SUCCEEDED

        fd = self._selector.fileno()
        while True:
            await trio.lowlevel.wait_readable(fd)
            self._io_ready = True
            self._queue.wake()
            self._poller = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)

    def _poll(self) -> None:
        """Queues the callbacks of the file descriptors that are ready."""
        events = self._selector.select(0)
        if events:
            self._process_events(events)
        elif self._io_ready:
            self._io_ready = False
            if self._poller is not None:
                trio.lowlevel.reschedule(self._poller)
                self._poller = None

    # --- the main loop ---

    async def _main_loop(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._stopped = trio.Event()
        task_status.started()
        try:
            # Shielded as the stock loop is: what was scheduled before the loop is stopped runs, whatever is cancelled.
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._wait_for_io)
                    try:
                        while not self._stopped.is_set():
                            await self._wait_for_work()
                            await self._run_batch()
                    except TrioAsyncioExit:
                        pass  # raised by the callback that `stop` queues
                    finally:
                        nursery.cancel_scope.cancel()
        finally:
            self._stopped.set()

    async def _wait_for_work(self) -> None:
        if self._queue.handles or self._io_ready:
            await trio.lowlevel.cancel_shielded_checkpoint()
        elif self._timers:
            with trio.CancelScope(deadline=self._timers[0].when()):
                await self._queue.sleep()
        else:
            await self._queue.sleep()

    async def _run_batch(self) -> None:
        """Looks for I/O, then runs what is ready, timers that are due first, until nothing is or time is up."""
        handles = self._queue.handles
        outer, sniffio.thread_local.name = sniffio.thread_local.name, "asyncio"
        try:
            self._poll()
            stop_at = perf_counter() + BATCH_SECS
            for _ in range(BATCH_ROUNDS):
                self._run_timers()
                if not handles:
                    return
                # What these add is for the next round, so that timers and I/O are not starved.
                for _ in range(len(handles)):
                    handle = handles.popleft()
                    if handle._cancelled:  # a call of `cancelled` costs as much as the rest
                        if isinstance(handle, AsyncHandle):
                            await self._start_trio(handle, outer)
                    elif handle.__class__ is asyncio.Handle:
                        handle._run()
                    elif isinstance(handle, asyncio.TimerHandle):
                        heapq.heappush(self._timers, handle)
                    elif isinstance(handle, AsyncHandle):
                        await self._start_trio(handle, outer)
                    else:
                        handle._run()
                if perf_counter() > stop_at:
                    return
        finally:
            sniffio.thread_local.name = outer

    def _run_timers(self) -> None:
        timers = self._timers
        if not timers:
            return
        now = self.time()
        while timers and timers[0].when() <= now:
            timer = heapq.heappop(timers)
            if not timer.cancelled():
                timer._run()

    async def _start_trio(self, handle: Any, outer: str | None) -> None:
        """Starts the Trio task of a `trio_as_future`; it is running when this returns, as the stock loop promises."""
        # Trio's other tasks run while this waits and must not believe that they are asyncio's.
        sniffio.thread_local.name = outer
        try:
            handle._context.run(self._nursery.start_soon, handle._run, name=handle._callback)
            await handle._started.wait()
        finally:
            sniffio.thread_local.name = "asyncio"

    def start_soon_in_trio(self, fn: Callable[..., Any], *args: Any) -> None:
        """Starts a Trio task that lives as long as the loop at most. An error that leaves `fn` ends the loop."""
        self._nursery.start_soon(fn, *args)


def open_fast_loop() -> AbstractAsyncContextManager[Any]:
    """`trio_asyncio.open_loop()` over `FastLoop`, or as it is where `FastLoop` does not fit."""
    return _open()


def _opener() -> Callable[[], AbstractAsyncContextManager[Any]]:
    stock: Callable[[], AbstractAsyncContextManager[Any]] = trio_asyncio.open_loop
    body = inspect.unwrap(trio_asyncio.open_loop)
    version = importlib.metadata.version("trio-asyncio")
    fits = version.startswith(WRITTEN_FOR) and "TrioEventLoop" in body.__code__.co_names and hasattr(select, "epoll")
    if not fits:
        log.warning("stock_loop_used trio_asyncio=%s written_for=%s", version, WRITTEN_FOR)
        return stock
    globals_with_ours = {**body.__globals__, "TrioEventLoop": FastLoop}
    ours = types.FunctionType(body.__code__, globals_with_ours, "open_fast_loop", body.__defaults__, body.__closure__)
    return asynccontextmanager(ours)


_open = _opener()
