"""What both front doors share: writes seen through, waits ended by a drain, the id of a request."""

from __future__ import annotations

import pytest
import trio

from saga.drain import Drain
from saga.errors import Conflict, Unavailable
from saga.request_id import request_id
from saga.uncancelled import WRITE_SECS, uncancelled


async def test_a_write_is_finished_although_its_caller_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    done = []

    async def write(value: int) -> None:
        await trio.sleep(1)
        done.append(value)

    with trio.move_on_after(0.5) as scope:
        await uncancelled(write, 7)
        done.append(8)
    assert done == [7]
    assert scope.cancelled_caught


async def test_a_write_that_takes_too_long_is_unavailable(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    with pytest.raises(Unavailable, match="whether the change was made is unknown"):
        await uncancelled(trio.sleep_forever)
    assert trio.current_time() - began == WRITE_SECS


async def test_what_a_write_returns_or_raises_comes_through() -> None:
    async def write(error: Exception | None) -> str:
        if error is not None:
            raise error
        return "written"

    assert await uncancelled(write, None) == "written"
    with pytest.raises(Conflict):
        await uncancelled(write, Conflict("no"))


async def test_a_drain_ends_waits_under_way_and_later_ones_at_once(autojump_clock: trio.testing.MockClock) -> None:
    drain = Drain()
    ended: list[float] = []

    async def wait() -> None:
        with drain.ends_early() as scope:
            await trio.sleep(100)
        assert scope.cancelled_caught
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(3)
        began = trio.current_time()
        assert not drain.begun
        drain.begin()
        await drain.wait()
    await wait()
    assert ended == [began, began]
    assert drain.begun


async def test_a_wait_that_ends_by_itself_is_not_cut_short(autojump_clock: trio.testing.MockClock) -> None:
    drain = Drain()
    with drain.ends_early() as scope:
        await trio.sleep(1)
    drain.begin()
    assert not scope.cancelled_caught


@pytest.mark.parametrize("sent", ["r-1", "x" * 128, "a b"])
def test_an_id_of_printable_ascii_is_kept(sent: str) -> None:
    assert request_id(sent) == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "a\nb", "é"])
def test_any_other_id_is_replaced(sent: str | None) -> None:
    assert len(request_id(sent)) == 36
    assert request_id(sent) != request_id(sent)
