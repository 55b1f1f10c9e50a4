"""The crossing itself: `open_loop`, `run_aio`, `call_trio`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar, TypeVarTuple

import trio_asyncio  # type: ignore[import-untyped]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
log = logging.getLogger("saga.bridge")


@asynccontextmanager
async def open_loop() -> AsyncIterator[trio_asyncio.BaseTrioEventLoop]:
    """An asyncio loop inside the running Trio; a stray asyncio error is logged and never ends the process."""
    async with trio_asyncio.open_loop() as loop:
        loop.set_exception_handler(lambda _loop, context: log.error("asyncio.stray_error %s", context))
        yield loop


async def run_aio(coro: Coroutine[Any, Any, T]) -> T:
    """From Trio: runs an asyncio coroutine to its end; a Trio cancel reaches it as CancelledError."""

    async def body() -> T:
        return await coro

    return await trio_asyncio.aio_as_trio(body)()  # type: ignore[no-any-return]  # untyped library


async def call_trio(fn: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """From asyncio: runs a Trio function; errors cross unchanged."""
    return await trio_asyncio.trio_as_aio(fn)(*args)  # type: ignore[no-any-return]  # untyped library


class StrayCancel(Exception):
    """An asyncio task was cancelled by something other than our own scope."""


def running_loop() -> asyncio.AbstractEventLoop:
    """The loop of the running task. Raises RuntimeError outside `open_loop`."""
    return asyncio.get_running_loop()
