"""Crossing between Trio and asyncio: results, errors and cancels, both ways and nested."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator

import pytest
import sniffio
import trio

import bridge
from bridge import StrayCancel, call_trio, run_aio


@pytest.fixture
async def loop() -> AsyncIterator[asyncio.AbstractEventLoop]:
    async with bridge.open_loop() as loop:
        yield loop


class Refused(Exception):
    pass


# --- from Trio to asyncio ---


async def test_a_result_crosses_to_trio(loop: object) -> None:
    async def add() -> int:
        await asyncio.sleep(0)
        return 3

    assert await run_aio(add()) == 3


async def test_a_coroutine_that_never_waits_gives_its_result(loop: object) -> None:
    async def give() -> str:
        return "given"

    assert await run_aio(give()) == "given"


async def test_an_error_crosses_to_trio_unchanged(loop: object) -> None:
    async def refuse() -> None:
        await asyncio.sleep(0)
        raise Refused("no")

    with pytest.raises(Refused, match="no"):
        await run_aio(refuse())


async def test_asyncio_code_knows_its_task_and_its_library(loop: object) -> None:
    async def look() -> tuple[bool, str, str]:
        before = sniffio.current_async_library()
        await asyncio.sleep(0)
        return asyncio.current_task() is not None, before, sniffio.current_async_library()

    assert await run_aio(look()) == (True, "asyncio", "asyncio")
    assert sniffio.current_async_library() == "trio"


async def test_a_trio_cancel_reaches_the_coroutine_and_waits_for_its_end(loop: object) -> None:
    seen: list[str] = []
    waiting, unwound = trio.Event(), trio.Event()

    async def work() -> None:
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
            seen.append("unwound")
            unwound.set()
            raise

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_aio, work())
            await waiting.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert seen == ["cancelled", "unwound"]


async def test_a_cancelled_scope_never_starts_the_coroutine(loop: object) -> None:
    started = False

    async def work() -> None:
        nonlocal started
        started = True

    with trio.CancelScope() as scope:
        scope.cancel()
        await run_aio(work())
    assert scope.cancelled_caught
    assert not started


async def test_a_coroutine_that_swallows_the_cancel_returns_its_value(loop: object) -> None:
    async def stubborn() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return "kept"

    with trio.move_on_after(0.01) as scope:
        value = await run_aio(stubborn())
    assert value == "kept"
    assert not scope.cancelled_caught


async def test_a_cancel_from_within_asyncio_is_an_ordinary_error(loop: object) -> None:
    async def cancelled_by_a_library() -> None:
        future = bridge.running_loop().create_future()
        future.cancel()
        await future

    with pytest.raises(StrayCancel, match="cancelled_by_a_library"):
        await run_aio(cancelled_by_a_library())


async def test_run_aio_outside_a_loop_leaves_no_coroutine_behind() -> None:
    async def work() -> None: ...

    with pytest.raises(RuntimeError):
        await run_aio(work())


async def test_asyncio_timeouts_raise_timeout_error(loop: object, autojump_clock: trio.abc.Clock) -> None:
    async def slow() -> None:
        async with asyncio.timeout(100):
            await asyncio.sleep(1000)

    started = trio.current_time()
    with pytest.raises(TimeoutError):
        await run_aio(slow())
    assert trio.current_time() - started == pytest.approx(100)


async def test_many_random_cancels_lose_no_caller(loop: object) -> None:
    dice = random.Random(7)
    ended = 0

    async def one(give_up_secs: float, work_secs: float) -> None:
        nonlocal ended
        with trio.move_on_after(give_up_secs):
            await run_aio(asyncio.sleep(work_secs))
        ended += 1

    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(one, dice.random() * 0.02, dice.random() * 0.02)
    assert ended == 300


# --- from asyncio to Trio ---


async def test_a_result_crosses_to_asyncio(loop: object) -> None:
    async def add(a: int, b: int) -> int:
        await trio.lowlevel.checkpoint()
        return a + b

    assert await run_aio(call_trio(add, 1, 2)) == 3


async def test_trio_code_called_from_asyncio_knows_its_library(loop: object) -> None:
    async def look() -> str:
        await trio.lowlevel.checkpoint()
        return sniffio.current_async_library()

    assert await run_aio(call_trio(look)) == "trio"


async def test_the_single_error_of_a_nursery_crosses_as_itself(loop: object) -> None:
    async def refuse() -> None:
        raise Refused("in a nursery")

    async def in_nurseries() -> None:
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            inner.start_soon(refuse)
            outer.start_soon(trio.sleep_forever)

    async def caller() -> str:
        try:
            await call_trio(in_nurseries)
        except Refused as error:
            return str(error)
        return "nothing"

    assert await run_aio(caller()) == "in a nursery"


async def test_several_errors_cross_as_a_group(loop: object) -> None:
    async def refuse() -> None:
        raise Refused

    async def twice() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            nursery.start_soon(refuse)

    with pytest.raises(ExceptionGroup) as caught:
        await run_aio(call_trio(twice))
    assert len(caught.value.exceptions) == 2


async def test_an_asyncio_cancel_reaches_the_trio_function_and_waits_for_its_end(loop: object) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            seen.append("unwound")

    async def caller() -> str:
        task = asyncio.ensure_future(call_trio(work))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        return "cancelled" if task.cancelled() else "ended otherwise"

    assert await run_aio(caller()) == "cancelled"
    assert seen == ["unwound"]


async def test_an_asyncio_timeout_around_trio_is_a_timeout_error(loop: object, autojump_clock: trio.abc.Clock) -> None:
    async def caller() -> None:
        async with asyncio.timeout(5):
            await call_trio(trio.sleep_forever)

    started = trio.current_time()
    with pytest.raises(TimeoutError):
        await run_aio(caller())
    assert trio.current_time() - started == pytest.approx(5)


async def test_a_cancel_goes_through_trio_asyncio_trio(loop: object, autojump_clock: trio.abc.Clock) -> None:
    seen: list[str] = []

    async def innermost() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            seen.append("innermost")
            raise

    async def middle() -> None:
        try:
            await call_trio(innermost)
        except asyncio.CancelledError:
            seen.append("middle")
            raise

    with trio.move_on_after(1) as scope:
        await run_aio(middle())
    assert scope.cancelled_caught
    assert seen == ["innermost", "middle"]


async def test_trio_called_from_asyncio_ends_with_the_loop() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await trio.sleep_forever()
        finally:
            ended = True

    async def caller() -> None:
        await call_trio(work)

    async with bridge.open_loop() as loop:
        task = loop.create_task(caller())
        await trio.testing.wait_all_tasks_blocked()
    assert ended
    assert task.cancelled()


async def test_connections_that_nobody_closed_end_with_the_loop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with bridge.open_loop() as loop:
            transport, _ = await run_aio(loop.create_connection(asyncio.Protocol, *listener.getsockname()))
            peer, _ = listener.accept()
        with peer:
            peer.settimeout(5)
            assert peer.recv(1) == b""
        assert transport.is_closing()
