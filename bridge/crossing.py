"""The crossing itself: `open_loop`, `run_aio`, `call_trio`.

Both directions keep three promises. An ordinary error crosses unchanged. A cancel of the waiting side cancels the
other side, and the wait ends when that side has unwound, not before; so what blocks in a `finally` there must be
bounded there. A cancellation never crosses as an exception of the foreign kind.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar, TypeVarTuple

import sniffio
import trio
import trio_asyncio  # type: ignore[import-untyped]

from bridge.fast_loop import FastLoop, open_fast_loop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
log = logging.getLogger("saga.bridge")


class StrayCancel(Exception):
    """The asyncio coroutine ended with a CancelledError that no scope of ours had asked for.

    Libraries do that when they cancel a future somebody else waits for (a connection that is closed under a call). In
    Trio it would be a BaseException that nobody handles and that ends the whole nursery.
    """


@asynccontextmanager
async def open_loop() -> AsyncIterator[asyncio.AbstractEventLoop]:
    """An asyncio loop inside the running Trio, for everything that is started in the block.

    An error that asyncio code has nobody to raise to (a task nobody awaited, a callback, a protocol fed with an unknown
    frame) is logged as `asyncio_stray_error`. The loop's own habit is to end the process, which would let any client
    of the gRPC server do so.

    Connections that are still there at the end of the block are cut off; one with TLS may be, though it was closed,
    since it waits for the other side's word.
    """
    async with open_fast_loop() as loop:
        loop.set_exception_handler(_log_stray_error)
        try:
            yield loop
        finally:
            # asyncio's own list of them; what this queues runs before the loop is stopped.
            for transport in list(loop._transports.values()):
                transport.abort()


def _log_stray_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("asyncio_stray_error message=%r", context.get("message"), exc_info=error)


def running_loop() -> asyncio.AbstractEventLoop:
    """The loop of the running task. Raises RuntimeError outside `open_loop`."""
    return asyncio.get_running_loop()


# --- from Trio to asyncio --------------------------------------------------------------------------------------------


async def run_aio(coro: Coroutine[Any, Any, T]) -> T:
    """From Trio: runs an asyncio coroutine to its end and returns or raises what it did.

    Cancelled: the coroutine sees one CancelledError, and this waits until it has ended. If it ends otherwise than
    cancelled (it had finished, or would not stop), that is what this returns or raises, and the cancel is delivered at
    the next checkpoint. A scope that is cancelled already never starts the coroutine. Raises `StrayCancel` for a
    cancellation that did not come from here.
    """
    try:
        loop = running_loop()
        await trio.lowlevel.checkpoint_if_cancelled()
    except BaseException:
        coro.close()
        raise
    task = _start(coro, loop)
    raise_cancel: trio.lowlevel.RaiseCancelT | None = None
    if not task.done():
        waiter = trio.lowlevel.current_task()
        task.add_done_callback(lambda _: trio.lowlevel.reschedule(waiter))

        def abort(raiser: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            nonlocal raise_cancel
            raise_cancel = raiser
            task.cancel()
            return trio.lowlevel.Abort.FAILED

        await trio.lowlevel.wait_task_rescheduled(abort)
    if task.cancelled():
        if raise_cancel is not None:
            raise_cancel()
        raise StrayCancel(f"{getattr(coro, '__qualname__', coro)} was cancelled from within asyncio")
    return task.result()


if sys.version_info >= (3, 12):

    def _start(coro: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> asyncio.Task[T]:
        """Runs the coroutine up to its first wait at once: one that has nothing to wait for costs no tick."""
        outer, sniffio.thread_local.name = sniffio.thread_local.name, "asyncio"
        try:
            return asyncio.Task(coro, loop=loop, eager_start=True)
        finally:
            sniffio.thread_local.name = outer

else:

    def _start(coro: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> asyncio.Task[T]:
        return loop.create_task(coro)


# --- from asyncio to Trio --------------------------------------------------------------------------------------------


async def call_trio(fn: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """From asyncio: runs a Trio function and returns or raises what it did.

    A group that holds a single error, which is what a nursery makes of one, is raised as that error: libraries choose
    their answer by its type. Cancelled: the function sees Cancelled, and this waits until it has ended.
    """
    loop = running_loop()
    if not isinstance(loop, FastLoop):
        try:
            return await trio_asyncio.trio_as_aio(fn)(*args)  # type: ignore[no-any-return]  # untyped library
        except BaseExceptionGroup as group:
            raise _sole_error(group) from None
    result: _TrioResult[T] = _TrioResult(loop=loop)
    loop.start_soon_in_trio(_fill, result, fn, args)
    return await result


class _TrioResult(asyncio.Future[T], Generic[T]):
    """What a Trio function will return; cancelling it cancels the function, and it stays open until that has ended."""

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.scope = trio.CancelScope()

    def cancel(self, msg: Any | None = None) -> bool:
        if self.done():
            return False
        self.scope.cancel()
        return True

    def set_cancelled(self) -> None:
        """The function has ended cancelled."""
        super().cancel()


async def _fill(result: _TrioResult[T], fn: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> None:
    """In Trio: runs the function and puts what came of it into `result`."""
    try:
        with result.scope:
            value = await fn(*args)
    except trio.Cancelled:
        # The loop itself is being closed.
        result.set_cancelled()
        raise
    except BaseExceptionGroup as group:
        cancelled, rest = group.split(trio.Cancelled)
        if rest is None:
            result.set_cancelled()
        else:
            result.set_exception(_sole_error(rest))
        if cancelled is not None:
            raise cancelled from None
    except BaseException as error:  # noqa: BLE001  (raised on the other side, whatever it is)
        result.set_exception(error)
    else:
        if result.scope.cancelled_caught:
            result.set_cancelled()
        else:
            result.set_result(value)


def _sole_error(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
