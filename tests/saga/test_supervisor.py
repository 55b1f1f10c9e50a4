"""Many sagas, one or more workers over one store, virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.errors import Unavailable
from saga.facts import Call, Fact
from saga.model import Saga, SagaStatus, StepAction
from saga.ports import (
    CancelAccepted,
    Claimed,
    Created,
    NewSaga,
    NoticesMissed,
    Record,
    Recorded,
    SagasDue,
    WorkflowAdded,
)
from saga.service import StartSaga
from saga.supervisor import CLAIM_PAGE, POLL_SECS, Limits
from saga.transitions import advance, judge, next_command
from saga.workflow import OnUnknown, WorkflowDefinition
from tests.saga.samples import AT, BEGAN, SENT, began, failed, patient, step, succeeded, undone, workflow
from tests.saga.samples import refused as refused_answer
from tests.support.world import (
    Behaviour,
    InterposedStore,
    Worker,
    World,
    bug,
    hang,
    late,
    memory_store,
    ok,
    refuse,
    saga_id,
    seconds_of,
    told,
)

S = SagaStatus
ONCE = patient(1)
ONE_STEP = workflow(step("a", timeout_secs=600.0), timeout_secs=None)


@asynccontextmanager
async def worker_of(
    script: dict[str, list[Behaviour]] | None, *definitions: WorkflowDefinition, **options: Any
) -> AsyncIterator[Worker]:
    """A worker at work over a store of its own."""
    world = World(script)
    async with memory_store(world, *definitions) as store:
        worker = Worker(store.port, world, **options)
        async with worker.at_work():
            yield worker


def store_of(worker: Worker) -> InterposedStore:
    assert isinstance(worker.store, InterposedStore)
    return worker.store


async def start(worker: Worker, **request: Any) -> str:
    started = await worker.service.start(StartSaga(workflow_name="order", **request))
    return started.saga.saga_id


async def waiting_saga(worker: Worker, number: int, version: int = 1) -> str:
    """A saga in the backlog, as if another worker had accepted it."""
    created = await worker.store.create(
        NewSaga(saga_id=saga_id(number), workflow_name="order", workflow_version=version, payload={})
    )
    return created.saga.saga_id


async def saga_of(worker: Worker, saga: str) -> Saga:
    found = await worker.store.get(saga)
    assert found is not None
    return found


async def logs_of(worker: Worker, saga: str) -> list[str]:
    return told(await worker.store.step_logs(saga))


def admitted(world: World) -> dict[float, set[str]]:
    """Which sagas made a call at each instant; within one instant Trio shuffles on purpose."""
    at: dict[float, set[str]] = {}
    for seen in world.seen:
        at.setdefault(seen.at, set()).add(seen.call.saga_id)
    return at


async def settle() -> None:
    """Lets everything happen that needs no time."""
    await trio.testing.wait_all_tasks_blocked()


# --- admission -------------------------------------------------------------------------------------------------------


async def test_a_saga_is_begun_at_once_when_there_is_room(autojump_clock: MockClock) -> None:
    async with worker_of({}, workflow()) as worker:
        await settle()
        ended = await worker.end_of(await start(worker))
        assert (ended.status, worker.world.clock.seconds()) == (S.COMPLETED, 0.0)
        assert (ended.epoch, ended.workflow_version) == (1, 1)
        await settle()
        assert worker.supervisor.active == 0
        assert worker.meter.counts["started"] == worker.meter.counts["ended COMPLETED"] == 1


async def test_no_more_than_max_concurrent_run_and_the_oldest_go_first(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(10.0)]}, ONE_STEP, limits=Limits(max_concurrent=2)) as worker:
        ids = [await start(worker) for _ in range(6)]
        for saga in ids:
            await worker.end_of(saga)
        assert worker.world.most_at_once == 2
        assert admitted(worker.world) == {0.0: set(ids[:2]), 10.0: set(ids[2:4]), 20.0: set(ids[4:])}


async def test_a_new_saga_does_not_overtake_those_that_wait(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(10.0)]}, ONE_STEP, limits=Limits(max_concurrent=1)) as worker:
        first, second = await start(worker), await start(worker)
        await trio.sleep(5.0)
        third = await start(worker)
        await worker.end_of(third)
        assert [seen.call.saga_id for seen in worker.world.seen] == [first, second, third]


async def test_a_new_saga_waits_while_it_is_unknown_who_waits_already(autojump_clock: MockClock) -> None:
    world = World()
    async with memory_store(world, ONE_STEP) as store:
        worker = Worker(store.port, world, limits=Limits(max_concurrent=1))
        older = await waiting_saga(worker, 1)

        async def away_once(*args: Any) -> None:
            del store.before["claim_due_sagas"]
            raise Unavailable("the database is away")

        store.before["claim_due_sagas"] = away_once
        async with worker.at_work():
            await settle()
            newer = await start(worker)
            await worker.end_of(newer)
        assert [seen.call.saga_id for seen in world.seen] == [older, newer]


async def test_a_thousand_sagas_pass_through_ten_places(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(1.0)]}, ONE_STEP, limits=Limits(max_concurrent=10)) as worker:
        ids = [await start(worker) for _ in range(1000)]
        last = await worker.end_of(ids[-1])
        await trio.sleep(2.0)
        assert worker.world.most_at_once == 10
        assert seconds_of(last.updated_at) == 100.0
        assert (await worker.store.count_open()) == {}
        assert sorted(worker.world.effects.values()) == [1] * 1000
        assert admitted(worker.world) == {float(n): set(ids[10 * n : 10 * n + 10]) for n in range(100)}


async def test_a_claim_takes_a_page_at_a_time_however_many_places_are_free(autojump_clock: MockClock) -> None:
    """Of a thousand payloads of a mebibyte, all at once would be a gibibyte, and a lease that waits behind them."""
    world = World({"a": [late(10.0)]})
    asked = []

    async def note(worker_id: str, limit: int) -> None:
        asked.append(limit)

    async with memory_store(world, ONE_STEP) as store:
        worker = Worker(store.port, world, limits=Limits(max_concurrent=3 * CLAIM_PAGE))
        for number in range(2 * CLAIM_PAGE + 1):
            await waiting_saga(worker, number)
        store.before["claim_due_sagas"] = note
        async with worker.at_work():
            await settle()
            assert worker.supervisor.active == 2 * CLAIM_PAGE + 1
        assert max(asked) == CLAIM_PAGE


async def test_sagas_that_others_accepted_are_found_within_the_poll(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        await trio.sleep(10.5)
        saga = await waiting_saga(worker, 1)
        await worker.end_of(saga)
        assert worker.world.clock.seconds() <= 11.5


async def test_a_saga_that_another_worker_tells_of_is_taken_at_once_and_starts_here_do_not_wait_for_it(
    autojump_clock: MockClock,
) -> None:
    limits = Limits(max_concurrent=4)
    async with worker_of({"a": [late(100.0)]}, ONE_STEP, limits=limits) as worker:
        await trio.sleep(10.5)
        told_of = await waiting_saga(worker, 1)
        started: list[Saga] = []

        async def start_meanwhile(claimed: list[Claimed]) -> None:
            # Half of the places were kept for this.
            started.append((await worker.service.start(StartSaga(workflow_name="order"))).saga)

        store_of(worker).after["claim_due_sagas"] = start_meanwhile
        worker.supervisor.notice(SagasDue())
        await settle()
        store_of(worker).after.clear()
        assert worker.world.clock.seconds() == 10.5
        assert {seen.call.saga_id for seen in worker.world.seen} == {told_of, started[0].saga_id}
        assert started[0].owner == worker.supervisor.worker_id


async def test_a_saga_that_is_told_of_while_there_is_no_room_is_taken_when_there_is(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(10.25)]}, ONE_STEP, limits=Limits(max_concurrent=1)) as worker:
        await settle()
        first = await start(worker)
        await settle()
        second = await waiting_saga(worker, 1)
        worker.supervisor.notice(SagasDue())
        await worker.end_of(first)
        await worker.end_of(second)
        assert worker.world.clock.seconds() == 20.5


async def test_a_notice_of_a_cancel_reaches_the_owner_and_nobody_else(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP) as worker:
        await settle()
        saga = await start(worker)
        await settle()
        # As another worker does it; this one has the saga.
        await worker.store.request_cancel_unless_terminal(saga)
        worker.supervisor.notice(CancelAccepted(saga_id=saga, owner="somebody-else"))
        await settle()
        assert not worker.world.cut_off
        worker.supervisor.notice(CancelAccepted(saga_id=saga, owner=worker.supervisor.worker_id))
        assert (await worker.end_of(saga)).status is S.CANCELLED
        assert worker.world.clock.seconds() == 0.0


async def test_a_notice_of_a_workflow_makes_the_next_start_read_it(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        await settle()
        await start(worker)
        await worker.store.register_workflow(workflow(step("a"), step("b")), "")
        assert (await saga_of(worker, await start(worker))).workflow_version == 1
        worker.supervisor.notice(WorkflowAdded(name="order"))
        assert (await saga_of(worker, await start(worker))).workflow_version == 2


async def test_a_worker_that_may_have_missed_notices_looks_for_everything_at_once(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP) as worker:
        await settle()
        cancelled = await start(worker)
        await trio.sleep(10.5)
        await worker.store.request_cancel_unless_terminal(cancelled)
        waiting = await waiting_saga(worker, 1)
        await worker.store.register_workflow(workflow(step("a"), step("b")), "")
        worker.supervisor.notice(NoticesMissed())
        await settle()
        assert worker.world.clock.seconds() == 10.5
        assert (await saga_of(worker, cancelled)).status is S.CANCELLED
        assert (await saga_of(worker, waiting)).owner == worker.supervisor.worker_id
        assert (await saga_of(worker, await start(worker))).workflow_version == 2


# --- one saga never touches another ----------------------------------------------------------------------------------


async def test_a_bug_in_one_saga_leaves_the_others_alone_and_is_tried_again_after_a_while(
    autojump_clock: MockClock,
) -> None:
    bad = workflow(step("bad"), name="bad", timeout_secs=None)
    async with worker_of({"bad": [bug(), ok()], "a": [late(5.0)]}, ONE_STEP, bad) as worker:
        await settle()
        good = await start(worker)
        broken = (await worker.service.start(StartSaga(workflow_name="bad"))).saga.saga_id
        assert (await worker.end_of(good)).status is S.COMPLETED
        aside = await saga_of(worker, broken)
        assert (aside.status, aside.owner, aside.outcome_unknown) == (S.RUNNING, None, True)
        assert worker.meter.counts["crashed"] == 1
        assert (await worker.end_of(broken)).status is S.COMPLETED
        at = [seen.at for seen in worker.world.seen if seen.what == "bad"]
        assert at[0] == 0.0
        assert 30.0 <= at[1] <= 31.0


async def test_a_saga_whose_workflow_is_gone_is_put_aside_and_the_next_one_runs(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        gone = await waiting_saga(worker, 1, version=9)
        good = await waiting_saga(worker, 2)
        assert (await worker.end_of(good)).status is S.COMPLETED
        aside = await saga_of(worker, gone)
        assert (aside.status, aside.owner) == (S.STARTED, None)
        assert 30.0 <= seconds_of(aside.next_attempt_at) <= 32.0


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


# --- two workers -----------------------------------------------------------------------------------------------------


async def test_two_workers_share_the_work_and_never_run_a_saga_twice(autojump_clock: MockClock) -> None:
    world = World({"a": [late(3.0)]})
    async with memory_store(world, ONE_STEP) as store:
        limits = Limits(max_concurrent=5)
        one = Worker(store.port, world, name="one", limits=limits)
        two = Worker(store.port, world, name="two", limits=limits)
        ids = [await waiting_saga(one, number) for number in range(100)]
        async with one.at_work(), two.at_work():
            for saga in ids:
                assert (await one.end_of(saga)).status is S.COMPLETED
        assert Counter(seen.call.saga_id for seen in world.seen) == dict.fromkeys(ids, 1)
        assert world.most_at_once == 10
        assert {(await saga_of(one, saga)).epoch for saga in ids} == {1}


async def test_a_worker_that_dies_is_succeeded_when_its_lease_has_ended(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", on_unknown=OnUnknown.COMPENSATE), timeout_secs=None)
    world = World({"b": [hang(works=True), ok()]})
    async with memory_store(world, definition) as store:
        old, new = Worker(store.port, world, name="old"), Worker(store.port, world, name="new")
        async with new.at_work():
            await trio.sleep(0.5)
            async with old.at_work():
                await settle()
                saga = await start(old)
                await world.until_called("b")
            assert (await new.end_of(saga)).status is S.COMPLETED
        assert world.order == ["a", "b", "b"]
        cut, again = world.seen[1], world.seen[2]
        assert 15.0 <= again.at <= 17.0
        assert (cut.call.attempt, again.call.attempt) == (1, 1)
        assert cut.call.idempotency_key == again.call.idempotency_key
        assert (cut.call.epoch, again.call.epoch) == (1, 2)
        assert world.effects[cut.call.idempotency_key] == 1


async def test_a_stale_owner_gets_nothing_written(autojump_clock: MockClock) -> None:
    world = World({"a": [late(3.0)]})  # answers before the next renewal would tell
    async with memory_store(world, ONE_STEP) as store:
        worker = Worker(store.port, world, name="old")
        async with worker.at_work():
            saga = await start(worker)
            await trio.sleep(1.5)
            await store.port.remove_worker("old")  # as if its lease had ended unnoticed
            await store.port.register_worker("new", 1000.0)
            (claimed,) = await store.port.claim_due_sagas("new", 1)
            await trio.sleep(30.0)
            assert await saga_of(worker, saga) == claimed.saga
            assert await logs_of(worker, saga) == []
            assert worker.meter.counts["lease lost"] == 1


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


# --- recovery from every stored state --------------------------------------------------------------------------------

THREE = workflow(step("a"), step("b"), step("c", retry=patient(3)), timeout_secs=None)
HISTORIES: dict[str, tuple[list[Fact], list[str], SagaStatus]] = {
    "STARTED": ([], ["a", "b", "c"], S.COMPLETED),
    "RUNNING at the first step": ([began], ["a", "b", "c"], S.COMPLETED),
    "RUNNING at the second": ([began, succeeded()], ["b", "c"], S.COMPLETED),
    "RUNNING at the last": ([began, succeeded(), succeeded()], ["c"], S.COMPLETED),
    "COMPENSATING, two to go": ([began, succeeded(), succeeded(), failed()], ["undo b", "undo a"], S.FAILED),
    "COMPENSATING, one to go": ([began, succeeded(), succeeded(), failed(), undone()], ["undo a"], S.FAILED),
}


async def bring_to(worker: Worker, facts: Sequence[Fact]) -> str:
    """A saga left by a worker that died there."""
    store, name = worker.store, "dead"
    await store.register_worker(name, 5.0)
    created = await store.create(
        NewSaga(saga_id=saga_id(1), workflow_name="order", workflow_version=1, payload={}, owner=name)
    )
    saga = created.saga
    for fact in facts:
        saga = (await store.record(advance(saga, THREE, fact, worker.world.clock.now()))).saga
    return saga.saga_id


@pytest.mark.parametrize("where", HISTORIES)
async def test_a_saga_goes_on_from_wherever_it_stood_on_the_version_it_began_with(
    where: str, autojump_clock: MockClock
) -> None:
    facts, order, end = HISTORIES[where]
    world = World()
    async with memory_store(world, THREE) as store:
        worker = Worker(store.port, world)
        saga = await bring_to(worker, facts)
        newer = workflow(step("x"), step("y"), timeout_secs=None)
        assert (await store.port.register_workflow(newer, "")).version == 2
        async with worker.at_work():
            ended = await worker.end_of(saga)
        assert (ended.status, ended.workflow_version, ended.epoch) == (end, 1, 2)
        assert world.order == order
        assert 5.0 <= world.seen[0].at <= 7.0
        assert all(seen.call.epoch == 2 for seen in world.seen)


async def test_a_recovered_saga_keeps_its_attempt_its_key_and_what_was_answered_before(
    autojump_clock: MockClock,
) -> None:
    definition = workflow(
        step("a"), step("b", input={"of": "steps.a.response.got"}, retry=patient(3)), timeout_secs=None
    )
    world = World({"b": [refuse("ABORTED")]})
    async with memory_store(world, definition) as store:
        worker = Worker(store.port, world)
        await store.port.register_worker("dead", 5.0)
        created = await store.port.create(
            NewSaga(saga_id=saga_id(1), workflow_name="order", workflow_version=1, payload={}, owner="dead")
        )
        saga = created.saga
        facts: list[Fact] = [began, succeeded()]
        call = Call(1, StepAction.EXECUTE, 1)
        facts.append(judge(definition, call, refused_answer("ABORTED"), request=SENT, started_at=BEGAN, draw=0.0))
        for fact in facts:
            saga = (await store.port.record(advance(saga, definition, fact, AT))).saga
        async with worker.at_work():
            await worker.end_of(saga.saga_id)
        assert [(seen.what, seen.call.attempt, seen.call.epoch) for seen in world.seen] == [
            ("b", 2, 2),
            ("b", 3, 2),
            ("undo a", 1, 2),
        ]
        assert world.seen[0].call.request == {"of": 2}
        assert world.seen[0].call.idempotency_key == f"{saga_id(1)}:1:execute"


@pytest.mark.parametrize("where", HISTORIES)
async def test_a_saga_read_back_is_asked_the_same_question_as_one_that_never_stopped(
    where: str, autojump_clock: MockClock
) -> None:
    facts, _, _ = HISTORIES[where]
    world = World()
    async with memory_store(world, THREE) as store:
        worker = Worker(store.port, world)
        await store.port.register_worker("dead", 5.0)
        created = await store.port.create(
            NewSaga(saga_id=saga_id(1), workflow_name="order", workflow_version=1, payload={}, owner="dead")
        )
        in_memory = created.saga
        for fact in facts:
            record = advance(in_memory, THREE, fact, AT)
            await store.port.record(record)
            in_memory = record.after
            stored = await saga_of(worker, in_memory.saga_id)
            again = await store.port.workflow("order", 1)
            assert again is not None
            assert next_command(stored, again.definition) == next_command(in_memory, THREE)


async def test_a_deadline_goes_on_counting_while_nobody_runs_the_saga(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", timeout_secs=500.0), timeout_secs=20.0)
    world = World({"a": [hang()]})
    async with memory_store(world, definition) as store:
        old, new = Worker(store.port, world, name="old"), Worker(store.port, world, name="new")
        async with old.at_work():
            saga = await start(old)
            await world.until_called("a")
        await trio.sleep(100.0)
        async with new.at_work():
            ended = await new.end_of(saga)
        assert ended.status is S.FAILED
        assert (ended.error_message or "").startswith("the workflow's deadline of 20 s passed")
        assert len(world.seen) == 1


async def test_a_crash_before_or_after_any_write_calls_each_key_with_one_effect(autojump_clock: MockClock) -> None:
    """The worker dies around each of its records in turn, just before it and just after."""
    definition = workflow(step("a"), step("b"), step("c", retry=ONCE), timeout_secs=None)
    for before in (True, False):
        for turn in range(8):
            world = World({"c": [refuse()]})
            async with memory_store(world, definition) as store:
                mortal = Worker(store.port, world, name="mortal")
                heir = Worker(store.port, world, name="heir")
                writes = 0
                died = trio.Event()

                async def die(
                    about: Record | Recorded,
                    store: InterposedStore = store,
                    turn: int = turn,
                    died: trio.Event = died,
                ) -> None:
                    nonlocal writes
                    writes += 1
                    if writes == turn + 1:
                        store.before.clear()
                        store.after.clear()
                        died.set()
                        await trio.sleep_forever()

                async with mortal.at_work():
                    (store.before if before else store.after)["record"] = die
                    saga = await start(mortal)
                    with trio.move_on_after(50.0):
                        await died.wait()
                async with heir.at_work():
                    ended = await heir.end_of(saga)
                assert ended.status is S.FAILED
                assert (await logs_of(heir, saga)) == [
                    "a EXECUTE SUCCESS x1",
                    "b EXECUTE SUCCESS x1",
                    "c EXECUTE FAILED x1",
                    "b COMPENSATE SUCCESS x1",
                    "a COMPENSATE SUCCESS x1",
                ]
                assert set(world.effects.values()) == {1}


# --- workers with other participants ---------------------------------------------------------------------------------


async def test_a_worker_leaves_a_saga_whose_services_it_lacks_to_those_that_have_them(
    autojump_clock: MockClock,
) -> None:
    world = World()
    async with memory_store(world, ONE_STEP) as store:
        made = await store.port.create(
            NewSaga(saga_id=saga_id(1), workflow_name="order", workflow_version=1, payload={})
        )
        async with Worker(store.port, world, name="w1", services=("other",)).at_work():
            await trio.sleep(5)
            assert world.seen == []
            async with Worker(store.port, world, name="w2").at_work() as able:
                ended = await able.end_of(made.saga.saga_id)
    assert (ended.status, ended.outcome_unknown) == (SagaStatus.COMPLETED, False)
    assert len(world.seen) == 1


async def test_a_worker_does_not_accept_a_saga_whose_services_it_lacks(autojump_clock: MockClock) -> None:
    world = World()
    async with (
        memory_store(world, ONE_STEP) as store,
        Worker(store.port, world, services=("other",)).at_work() as worker,
    ):
        with pytest.raises(Unavailable, match="not configured here: svc"):
            await worker.service.start(StartSaga(workflow_name="order"))
        assert not any((await worker.service.count_open()).values())
