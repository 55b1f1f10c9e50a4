"""Workers whose lease runs out or is taken away, and workers whose store is away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.errors import Unavailable
from saga.model import SagaStatus
from saga.ports import Claimed, Created
from saga.supervisor import Limits
from tests.saga.at_work import settle, start, store_of, waiting_saga, worker_of
from tests.saga.samples import step, workflow
from tests.support.world import Worker, World, bug, hang, late, memory_store, ok, saga_id

S = SagaStatus
ONE_STEP = workflow(step("a", timeout_secs=600.0), timeout_secs=None)


# --- the lease -------------------------------------------------------------------------------------------------------


async def test_a_worker_that_cannot_renew_stops_its_sagas_before_the_lease_ends(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker:
        await start(worker)
        await trio.sleep(1.0)
        store_of(worker).away = True
        await trio.sleep(60.0)
        assert [what for what, _ in worker.world.cut_off] == ["a"]
        assert worker.world.cut_off[0][1] < 15.0


@pytest.mark.parametrize("answers_after", [4.9, 6.0, 8.0, 1000.0])
async def test_a_renewal_that_hangs_does_not_carry_a_saga_past_the_lease(
    answers_after: float, autojump_clock: MockClock
) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker:

        async def hanging(*args: Any) -> None:
            await trio.sleep(answers_after)
            raise Unavailable("no answer")

        await start(worker)
        await trio.sleep(1.0)
        store_of(worker).before["renew_lease"] = hanging
        await trio.sleep(60.0)
        assert worker.world.cut_off
        assert worker.world.cut_off[0][1] < 15.0


async def test_a_saga_that_is_being_created_when_the_lease_is_lost_is_not_run_without_it(
    autojump_clock: MockClock,
) -> None:
    async with (
        worker_of({"a": [hang()]}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(1.0)

        async def slow(created: Created) -> None:
            store_of(worker).away = True
            await trio.sleep(20.0)

        store_of(worker).after["create"] = slow
        nursery.start_soon(start, worker)
        await trio.sleep(50.0)
        assert worker.supervisor.active == 0
        assert worker.world.cut_off == [(what, at) for what, at in worker.world.story]  # none outlived its beginning


async def test_a_saga_created_after_the_lease_was_lost_calls_nobody_until_there_is_a_lease_again(
    autojump_clock: MockClock,
) -> None:
    async with (
        worker_of({"a": [hang()]}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(1.5)  # between two sweeps: a sweep holds all places while it claims

        async def slow(created: Created) -> None:
            store_of(worker).away = True
            await trio.sleep(20.0)
            store_of(worker).away = False  # so that nothing but the worker itself keeps the saga from being begun

        store_of(worker).after["create"] = slow
        nursery.start_soon(start, worker)
        await worker.world.until_called("a")
        await trio.sleep(10.0)
        assert [seen.call.epoch for seen in worker.world.seen] == [2]


async def test_a_worker_that_lost_its_lease_starts_over_and_takes_its_sagas_up_again(
    autojump_clock: MockClock,
) -> None:
    async with worker_of({"a": [hang(), ok()]}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker:
        saga = await start(worker)
        await trio.sleep(1.0)
        store_of(worker).away = True
        await trio.sleep(60.0)
        store_of(worker).away = False
        ended = await worker.end_of(saga)
        assert (ended.status, ended.epoch) == (S.COMPLETED, 2)
        assert worker.world.clock.seconds() <= 70.0
        assert [seen.call.attempt for seen in worker.world.seen] == [1, 1]


async def test_what_the_store_still_has_under_a_lost_lease_is_freed_before_the_worker_takes_another(
    autojump_clock: MockClock,
) -> None:
    async with worker_of({"a": [hang(), ok()]}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker:

        async def lost(*args: Any) -> None:
            raise Unavailable("no answer")

        store_of(worker).before["renew_lease"] = lost
        saga = await start(worker)
        await worker.end_of(saga)
        # Its lease in the store has not ended when it joins again, so nobody else would have freed the saga.
        assert worker.world.clock.seconds() < 15.0


async def test_a_worker_held_up_past_its_lease_takes_nothing_more_though_it_was_not_told(
    autojump_clock: MockClock,
) -> None:
    async with worker_of({}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker:
        await trio.sleep(1.5)
        with worker.supervisor.place(saga_id(1)) as place:
            assert place.owner == "w1"
        autojump_clock.jump(14.0)
        with worker.supervisor.place(saga_id(2)) as place:
            assert place.owner is None


async def test_a_worker_whose_lease_was_taken_away_stops_at_the_next_renewal(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang(), ok()]}, ONE_STEP, limits=Limits(lease_secs=15.0)) as worker:
        saga = await start(worker)
        await trio.sleep(1.0)
        await worker.store.remove_worker("w1")
        assert (await worker.end_of(saga)).status is S.COMPLETED
        assert worker.world.clock.seconds() <= 7.0


# --- the store is away -----------------------------------------------------------------------------------------------


async def test_a_store_that_is_away_for_a_moment_stalls_everything_and_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    async with worker_of({"a": [late(2.0)]}, ONE_STEP, limits=Limits(max_concurrent=3)) as worker:
        ids = [await start(worker) for _ in range(9)]
        await trio.sleep(1.0)
        store_of(worker).away = True
        await trio.sleep(6.0)
        store_of(worker).away = False
        for saga in ids:
            assert (await worker.end_of(saga)).status is S.COMPLETED
        assert set(worker.world.effects.values()) == {1}
        assert len(worker.world.seen) == 9


async def test_a_worker_waits_for_a_store_that_is_away_at_its_start(autojump_clock: MockClock) -> None:
    world = World()
    async with memory_store(world, ONE_STEP) as store, trio.open_nursery() as nursery:
        store.away = True
        worker = Worker(store.port, world)

        async def come_back() -> None:
            await trio.sleep(20.0)
            store.away = False

        nursery.start_soon(come_back)
        async with worker.at_work():
            assert 20.0 <= world.clock.seconds() <= 26.0
            assert (await worker.end_of(await start(worker))).status is S.COMPLETED


async def test_a_creation_whose_answer_was_lost_is_run_all_the_same(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        await settle()
        made: list[str] = []

        async def lose(created: Created) -> None:
            made.append(created.saga.saga_id)
            del store_of(worker).after["create"]
            raise Unavailable("the answer of the database was lost")

        store_of(worker).after["create"] = lose
        with pytest.raises(Unavailable):
            await start(worker)
        assert (await worker.end_of(made[0], 5.0)).status is S.COMPLETED


async def test_a_claim_whose_answer_was_lost_leaves_no_saga_without_a_run(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(20.0)]}, ONE_STEP) as worker:
        await settle()
        running = await start(worker)
        await trio.sleep(5.5)
        lost = [await waiting_saga(worker, number) for number in range(3)]

        async def lose(claimed: Sequence[Claimed]) -> None:
            if claimed:
                del store_of(worker).after["claim_due_sagas"]
                raise Unavailable("the answer of the database was lost")

        store_of(worker).after["claim_due_sagas"] = lose
        for saga in lost:
            assert (await worker.end_of(saga, 60.0)).status is S.COMPLETED
        assert (await worker.end_of(running)).status is S.COMPLETED
        assert worker.world.cut_off == []
        assert len(worker.world.seen) == 4


async def test_a_saga_that_could_not_be_put_aside_is_freed_when_the_store_is_back(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [bug(), ok()]}, ONE_STEP) as worker:
        await settle()
        lost = 0

        async def refuse_release(*args: Any, **kwargs: Any) -> None:
            nonlocal lost
            lost += 1
            if lost == 1:
                raise Unavailable("the database is away")

        store_of(worker).before["release"] = refuse_release
        saga = await start(worker)
        assert (await worker.end_of(saga, 60.0)).status is S.COMPLETED
        assert worker.world.clock.seconds() < 5.0
