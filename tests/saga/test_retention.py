"""The loop that removes what ended long ago, under virtual time over the real store in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from saga.errors import Unavailable
from saga.model import Saga
from saga.retention import BATCH, DAY_SECS, REST, SHORTEST_REST_SECS, SWEEP_SECS, Retention
from saga.service import StartSaga
from tests.saga.samples import step, workflow
from tests.support.world import InterposedStore, Worker, World, memory_store

DAYS = 0.001
"""One and a half minutes: a worker has a second's work to do even in virtual time."""
ONE_STEP = workflow(step("a"), timeout_secs=None)


@asynccontextmanager
async def worker_without_events() -> AsyncIterator[tuple[Worker, InterposedStore, Retention]]:
    world = World()
    async with memory_store(world, ONE_STEP, events=False) as store:
        worker = Worker(store.port, world)
        async with worker.at_work():
            yield worker, store, Retention(store.port, worker.meter, DAYS)


async def ended(worker: Worker, count: int) -> list[Saga]:
    ids = [(await worker.service.start(StartSaga(workflow_name="order"))).saga.saga_id for _ in range(count)]
    return [await worker.end_of(saga_id) for saga_id in ids]


async def test_a_pass_removes_one_batch_and_counts_it(autojump_clock: MockClock) -> None:
    async with worker_without_events() as (worker, _, keeper):
        await ended(worker, BATCH + 3)
        assert await keeper.run_once() == 0
        await trio.sleep(DAYS * DAY_SECS + 1)
        (young,) = await ended(worker, 1)
        assert [await keeper.run_once() for _ in range(3)] == [BATCH, 3, 0]
        assert worker.meter.counts["removed"] == BATCH + 3
        assert await worker.service.saga(young.saga_id) == young


async def test_full_batches_follow_each_other_after_a_rest_and_then_comes_the_next_sweep(
    autojump_clock: MockClock,
) -> None:
    async with worker_without_events() as (worker, store, keeper):
        await ended(worker, 2 * BATCH + 1)
        await trio.sleep(DAYS * DAY_SECS + 1)
        began, passes = trio.current_time(), []

        async def slow(age_secs: float, limit: int) -> None:
            passes.append(trio.current_time() - began)
            await trio.sleep(2.0 if len(passes) == 1 else 0.0)

        store.before["remove_ended_before"] = slow
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            await trio.sleep(2 * SWEEP_SECS)
            nursery.cancel_scope.cancel()
        second = 2.0 + 2.0 * REST
        third = second + SHORTEST_REST_SECS
        assert passes == pytest.approx([0.0, second, third, third + SWEEP_SECS])
        assert worker.meter.counts["removed"] == 2 * BATCH + 1


@pytest.mark.parametrize("trouble", [Unavailable("the database is away"), ZeroDivisionError("a bug of ours")])
async def test_what_fails_is_tried_again_at_the_next_sweep_and_stops_nobody(
    trouble: Exception, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker_without_events() as (worker, store, keeper):
        await ended(worker, 1)
        await trio.sleep(DAYS * DAY_SECS + 1)

        async def fail(age_secs: float, limit: int) -> None:
            store.before.clear()
            raise trouble

        store.before["remove_ended_before"] = fail
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            await trio.sleep(SWEEP_SECS / 2)
            assert worker.meter.counts["removed"] == 0
            assert "retention_failed" in caplog.text
            await ended(worker, 1)
            await trio.sleep(SWEEP_SECS)
            nursery.cancel_scope.cancel()
        assert worker.meter.counts["removed"] == 1
