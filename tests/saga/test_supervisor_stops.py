"""What ends the run of a saga at a worker before the saga has ended: a cancel, a long pause, a drain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio
import trio.testing
from trio.testing import MockClock

from saga.errors import Unavailable
from saga.model import SagaStatus
from saga.ports import Claimed, Created, Record
from saga.supervisor import POLL_SECS, Limits
from tests.saga.at_work import THREE, bring_to, saga_of, settle, start, store_of, waiting_saga, worker_of
from tests.saga.samples import began, patient, step, succeeded, workflow
from tests.support.world import Worker, World, hang, late, memory_store, ok, refuse, seconds_of

S = SagaStatus
ONE_STEP = workflow(step("a", timeout_secs=600.0), timeout_secs=None)


# --- cancel ----------------------------------------------------------------------------------------------------------


async def test_a_cancel_reaches_the_call_in_flight_at_once(autojump_clock: MockClock) -> None:
    async with worker_of({"b": [hang()]}, workflow()) as worker:
        saga = await start(worker)
        await worker.world.until_called("b")
        await worker.service.cancel(saga)
        await settle()
        assert (await saga_of(worker, saga)).status is S.CANCELLED
        assert worker.world.cut_off == [("b", 0.0)]


async def test_a_waiting_saga_is_cancelled_without_waiting_for_its_turn(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(100.0)]}, ONE_STEP, limits=Limits(max_concurrent=1)) as worker:
        await start(worker)
        waiting = await start(worker)
        await worker.service.cancel(waiting)
        saga = await saga_of(worker, waiting)
        assert (saga.status, worker.world.clock.seconds()) == (S.CANCELLED, 0.0)
        assert saga.error_message == "cancelled before it began"
        assert worker.meter.counts["ended CANCELLED"] == 1


async def test_a_parked_saga_that_is_cancelled_is_due_at_once(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=patient(initial_interval_ms=500_000)), timeout_secs=None)
    async with worker_of({"b": [refuse("ABORTED")]}, definition) as worker:
        saga = await start(worker)
        await trio.sleep(100.25)
        assert (await saga_of(worker, saga)).owner is None
        await worker.service.cancel(saga)
        await settle()
        ended = await saga_of(worker, saga)
        assert (ended.status, seconds_of(ended.updated_at)) == (S.CANCELLED, 100.25)
        assert worker.world.story[-1] == ("undo a", 100.25)


async def test_a_cancel_that_meets_the_parking_of_its_saga_is_not_left_to_the_poll(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=patient(initial_interval_ms=500_000)), timeout_secs=None)
    async with worker_of({"b": [refuse("ABORTED", after_secs=1.25)]}, definition) as worker:
        saga = await start(worker)

        async def cancel_first(record: Record) -> None:
            if record.release:
                store_of(worker).before.clear()
                await worker.service.cancel(saga)

        store_of(worker).before["record"] = cancel_first
        ended = await worker.end_of(saga)
        assert (ended.status, seconds_of(ended.updated_at)) == (S.CANCELLED, 1.25)


async def test_a_cancel_that_comes_while_the_saga_is_being_claimed_is_seen(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP) as worker:
        await trio.sleep(5.5)
        saga = await waiting_saga(worker, 1)

        async def cancel_meanwhile(claimed: Sequence[Claimed]) -> None:
            if claimed:
                await worker.service.cancel(saga)

        store_of(worker).after["claim_due_sagas"] = cancel_meanwhile
        assert (await worker.end_of(saga)).status is S.CANCELLED
        assert worker.world.clock.seconds() <= 6.5
        assert worker.world.seen == []


async def test_a_cancel_that_comes_while_a_running_saga_is_being_claimed_stops_its_next_call(
    autojump_clock: MockClock,
) -> None:
    world = World({"b": [hang()]})
    async with memory_store(world, THREE) as store:
        worker = Worker(store.port, world)
        saga = await bring_to(worker, [began, succeeded()])

        async def cancel_meanwhile(claimed: Sequence[Claimed]) -> None:
            if claimed:
                await worker.service.cancel(saga)

        store.after["claim_due_sagas"] = cancel_meanwhile
        async with worker.at_work():
            assert (await worker.end_of(saga)).status is S.CANCELLED
        assert world.order == ["undo a"]


async def test_a_cancel_that_another_worker_accepted_reaches_the_call_in_flight_within_the_poll(
    autojump_clock: MockClock,
) -> None:
    world = World({"b": [hang()]})
    async with memory_store(world, THREE) as store:
        doer, other = Worker(store.port, world, name="doer"), Worker(store.port, world, name="other")
        async with doer.at_work(), other.at_work():
            await settle()
            saga = await start(doer)
            await trio.sleep(5.5)
            await other.service.cancel(saga)
            assert (await other.end_of(saga)).status is S.CANCELLED
        ((what, at),) = world.cut_off
        assert what == "b"
        assert 5.5 <= at <= 5.5 + POLL_SECS
        assert world.order == ["a", "b", "undo a"]


# --- parking ---------------------------------------------------------------------------------------------------------


async def test_a_saga_with_a_long_pause_gives_its_place_to_others_and_returns_when_due(
    autojump_clock: MockClock,
) -> None:
    definition = workflow(step("a", retry=patient(2, initial_interval_ms=60_000)), timeout_secs=None)
    async with worker_of({"a": [refuse("ABORTED"), ok()]}, definition, limits=Limits(max_concurrent=1)) as worker:
        await settle()
        saga = await start(worker)
        await settle()
        assert worker.supervisor.active == 0
        assert worker.supervisor.room == 1
        ended = await worker.end_of(saga)
        first, second = worker.world.seen
        assert (ended.status, first.at, second.call.attempt) == (S.COMPLETED, 0.0, 2)
        assert 60.0 <= second.at <= 61.0
        assert (first.call.epoch, second.call.epoch) == (1, 2)
        assert first.call.idempotency_key == second.call.idempotency_key


async def test_a_parked_saga_goes_on_at_another_worker_with_the_attempts_it_has_had(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", retry=patient(3, initial_interval_ms=60_000)), timeout_secs=None)
    world = World({"a": [refuse("ABORTED")]})
    async with memory_store(world, definition) as store:
        old, new = Worker(store.port, world, name="old"), Worker(store.port, world, name="new")
        async with old.at_work():
            saga = await start(old)
            await settle()
        assert (await saga_of(new, saga)).owner is None
        async with new.at_work():
            assert (await new.end_of(saga)).status is S.FAILED
        assert [(seen.call.attempt, seen.call.epoch) for seen in world.seen] == [(1, 1), (2, 2), (3, 3)]
        first, second, third = (seen.at for seen in world.seen)
        assert 60.0 <= second - first <= 60.0 + 2 * POLL_SECS
        assert 120.0 <= third - second <= 120.0 + 2 * POLL_SECS  # the second pause of an exponential back-off
        assert len({seen.call.idempotency_key for seen in world.seen}) == 1


# --- drain -----------------------------------------------------------------------------------------------------------


async def test_a_drain_lets_the_running_attempt_finish_and_frees_the_sagas(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b"))
    async with worker_of({"a": [late(5.0)]}, definition) as worker:
        saga = await start(worker)
        await trio.sleep(1.0)
        await worker.supervisor.drain()
        assert worker.world.clock.seconds() == 5.0
        freed = await saga_of(worker, saga)
        assert (freed.status, freed.current_step, freed.owner, freed.outcome_unknown) == (S.RUNNING, 1, None, False)
        assert worker.world.order == ["a"]
        assert worker.world.cut_off == []


async def test_a_saga_that_could_not_be_freed_in_a_drain_is_freed_while_others_finish(
    autojump_clock: MockClock,
) -> None:
    definition = workflow(step("a", retry=patient(initial_interval_ms=20_000)), timeout_secs=None)
    async with worker_of({"a": [refuse("ABORTED"), late(20.0)]}, definition) as worker, trio.open_nursery() as nursery:
        await start(worker)
        await trio.sleep(20.5)  # this one is in its second attempt
        waiting = await start(worker)
        await settle()

        async def lost(*args: Any, **kwargs: Any) -> None:
            store_of(worker).before.clear()
            raise Unavailable("no answer")

        store_of(worker).before["release"] = lost
        nursery.start_soon(worker.supervisor.drain)
        await trio.sleep(2 * POLL_SECS)
        assert worker.supervisor.active == 1
        assert (await saga_of(worker, waiting)).owner is None


async def test_a_drain_past_its_grace_cuts_off_and_marks_the_outcome_unknown(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP, limits=Limits(shutdown_grace_secs=7.0)) as worker:
        saga = await start(worker)
        await trio.sleep(1.0)
        await worker.supervisor.drain()
        assert worker.world.cut_off == [("a", 8.0)]
        freed = await saga_of(worker, saga)
        assert (freed.status, freed.attempt, freed.owner, freed.outcome_unknown) == (S.RUNNING, 1, None, True)


async def test_a_draining_worker_begins_nothing_but_still_accepts(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(5.0)]}, ONE_STEP) as worker, trio.open_nursery() as nursery:
        await start(worker)
        await trio.sleep(1.0)
        nursery.start_soon(worker.supervisor.drain)
        await settle()
        assert worker.service.is_draining
        late_comer = await saga_of(worker, await start(worker))
        await trio.sleep(10.0)
        assert (await saga_of(worker, late_comer.saga_id)) == late_comer
        assert (late_comer.owner, late_comer.status) == (None, S.STARTED)


async def test_a_saga_that_is_being_created_when_the_drain_begins_is_left_to_others(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker, trio.open_nursery() as nursery:
        await trio.sleep(1.0)
        drained = trio.Event()

        async def slow(created: Created) -> None:
            nursery.start_soon(drain)
            await trio.sleep(1.0)

        async def drain() -> None:
            await worker.supervisor.drain()
            drained.set()

        store_of(worker).after["create"] = slow
        saga = await saga_of(worker, await start(worker))
        await drained.wait()
        left = await saga_of(worker, saga.saga_id)
        assert (left.owner, left.status, worker.world.story) == (None, S.STARTED, [])
        assert worker.world.clock.seconds() == 2.0


async def test_a_drain_ends_though_the_store_is_away(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(5.0)]}, ONE_STEP, limits=Limits(shutdown_grace_secs=10.0)) as worker:
        await start(worker)
        await settle()
        store_of(worker).away = True
        await worker.supervisor.drain()
        assert worker.world.clock.seconds() <= 20.0
        assert worker.meter.counts["crashed"] == 0


async def test_what_a_drained_worker_leaves_is_taken_by_another_at_once(autojump_clock: MockClock) -> None:
    world = World({"a": [late(5.0)]})
    async with memory_store(world, workflow(step("a"), step("b"))) as store:
        old, new = Worker(store.port, world, name="old"), Worker(store.port, world, name="new")
        async with old.at_work():
            saga = await start(old)
            await trio.sleep(1.0)
            await old.supervisor.drain()
        async with new.at_work():
            assert (await new.end_of(saga)).status is S.COMPLETED
        assert world.story == [("a", 0.0), ("b", 5.0)]
        assert [seen.call.epoch for seen in world.seen] == [1, 2]
