"""The lane by itself, with a batch writer whose pace the test sets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from saga.errors import LeaseLost, RowRejected, Unavailable
from store.group_commit import Lane


class Disk:
    """Writes batches of words; each waits for a permit while the gate is shut."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.broken = False
        self.gate = trio.Event()
        self.gate.set()

    async def write(self, batch: Sequence[str]) -> list[str | Exception]:
        self.batches.append(list(batch))
        await self.gate.wait()
        if self.broken:
            raise Unavailable("gone")
        if any(word.startswith("poison") for word in batch):
            raise RowRejected("one of them")
        return [LeaseLost(word) if word.startswith("stale") else word.upper() for word in batch]


@asynccontextmanager
async def opened_lane(disk: Disk, *, max_batch: int = 100, max_waiting: int = 100) -> AsyncIterator[Lane[str, str]]:
    lane: Lane[str, str] = Lane(
        disk.write, key_of=lambda word: word.split(".")[0], max_batch=max_batch, max_waiting=max_waiting
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(lane.run)
        try:
            yield lane
        finally:
            lane.close()


async def write_all(lane: Lane[str, str], *words: str) -> dict[str, str | Exception]:
    results: dict[str, str | Exception] = {}

    async def one(word: str) -> None:
        try:
            results[word] = await lane.write(word)
        except (RowRejected, Unavailable, LeaseLost) as error:
            results[word] = error

    async with trio.open_nursery() as nursery:
        for word in words:
            nursery.start_soon(one, word)
            await trio.testing.wait_all_tasks_blocked()
    return results


async def test_a_lone_write_starts_at_once_under_a_clock_that_never_moves(mock_clock: trio.testing.MockClock) -> None:
    disk = Disk()
    async with opened_lane(disk) as lane:
        assert await lane.write("a") == "A"
        assert (lane.batches, lane.rows) == (1, 1)


async def test_what_comes_while_a_batch_is_on_its_way_goes_together_into_the_next() -> None:
    disk = Disk()
    disk.gate = trio.Event()
    async with opened_lane(disk) as lane, trio.open_nursery() as nursery:
        for word in ("a", "b", "c", "d"):
            nursery.start_soon(lane.write, word)
            await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert disk.batches == [["a"], ["b", "c", "d"]]
    assert (lane.batches, lane.rows) == (2, 4)


async def test_a_batch_has_a_largest_size() -> None:
    disk = Disk()
    disk.gate = trio.Event()
    async with opened_lane(disk, max_batch=2) as lane, trio.open_nursery() as nursery:
        for word in ("a", "b", "c", "d", "e"):
            nursery.start_soon(lane.write, word)
            await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert disk.batches == [["a"], ["b", "c"], ["d", "e"]]


async def test_two_rows_of_one_key_never_share_a_batch_and_keep_their_order() -> None:
    disk = Disk()
    disk.gate = trio.Event()
    async with opened_lane(disk) as lane, trio.open_nursery() as nursery:
        for word in ("first", "a.1", "a.2", "b.1", "a.3", "b.2"):
            nursery.start_soon(lane.write, word)
            await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert disk.batches == [["first"], ["a.1", "b.1"], ["a.2", "b.2"], ["a.3"]]


async def test_a_poisoned_row_is_refused_alone_and_the_others_land() -> None:
    disk = Disk()
    disk.gate = trio.Event()
    words = ("first", "a", "b", "poison", "c", "d", "poison2")
    results: dict[str, str | Exception] = {}

    async def fill(lane: Lane[str, str]) -> None:
        results.update(await write_all(lane, *words))

    async with opened_lane(disk) as lane, trio.open_nursery() as nursery:
        nursery.start_soon(fill, lane)
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert {word for word, result in results.items() if isinstance(result, RowRejected)} == {"poison", "poison2"}
    assert {result for result in results.values() if isinstance(result, str)} == {"FIRST", "A", "B", "C", "D"}


async def test_each_row_gets_its_own_answer() -> None:
    disk = Disk()
    async with opened_lane(disk) as lane:
        results = await write_all(lane, "a", "stale")
        assert results["a"] == "A"
        assert isinstance(results["stale"], LeaseLost)


async def test_a_lost_database_is_told_to_all_in_flight_and_the_next_batch_tries_again() -> None:
    disk = Disk()
    disk.broken = True
    async with opened_lane(disk) as lane:
        results = await write_all(lane, "a", "b")
        assert all(isinstance(result, Unavailable) for result in results.values())
        assert results["a"] is not results["b"]
        disk.broken = False
        assert await lane.write("c") == "C"
        assert lane.rows == 1


async def test_a_bug_in_one_batch_is_its_callers_and_the_lane_goes_on() -> None:
    async def write(batch: Sequence[str]) -> list[str | Exception]:
        if "bug" in batch:
            raise ZeroDivisionError
        return list(batch)

    lane: Lane[str, str] = Lane(write, key_of=str)
    async with trio.open_nursery() as nursery:
        await nursery.start(lane.run)
        with pytest.raises(ZeroDivisionError):
            await lane.write("bug")
        assert await lane.write("fine") == "fine"
        lane.close()


async def test_a_cancelled_caller_waits_for_the_outcome_of_its_write() -> None:
    disk = Disk()
    disk.gate = trio.Event()
    told: list[str] = []
    scope = trio.CancelScope()

    async def write(lane: Lane[str, str]) -> None:
        with scope:
            told.append(await lane.write("a"))
            await trio.lowlevel.checkpoint()
            told.append("not reached")

    async with opened_lane(disk) as lane, trio.open_nursery() as nursery:
        nursery.start_soon(write, lane)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert told == []
        disk.gate.set()
    assert told == ["A"]
    assert scope.cancelled_caught


async def test_callers_wait_while_the_lane_is_full_and_may_leave_without_having_written() -> None:
    disk = Disk()
    disk.gate = trio.Event()
    async with opened_lane(disk, max_batch=1, max_waiting=2) as lane, trio.open_nursery() as nursery:
        for word in ("a", "b", "c"):  # one on its way, two waiting
            nursery.start_soon(lane.write, word)
            await trio.testing.wait_all_tasks_blocked()
        leaving = trio.CancelScope()

        async def leave() -> None:
            with leaving:
                await lane.write("leaves")

        nursery.start_soon(leave)
        nursery.start_soon(lane.write, "stays")
        await trio.testing.wait_all_tasks_blocked()
        leaving.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert leaving.cancelled_caught
        disk.gate.set()
    assert disk.batches == [["a"], ["b"], ["c"], ["stays"]]


async def test_a_cancelled_lane_still_writes_what_waits_and_then_takes_nothing() -> None:
    disk = Disk()
    disk.gate = trio.Event()
    results: list[str] = []
    lane: Lane[str, str] = Lane(disk.write, key_of=str)

    async def write(word: str) -> None:
        results.append(await lane.write(word))

    async with trio.open_nursery() as callers, trio.open_nursery() as owner:
        await owner.start(lane.run)
        callers.start_soon(write, "a")
        callers.start_soon(write, "b")
        await trio.testing.wait_all_tasks_blocked()
        owner.cancel_scope.cancel()
        lane.close()
        disk.gate.set()
    assert sorted(results) == ["A", "B"]
    with pytest.raises(Unavailable):
        await lane.write("late")
