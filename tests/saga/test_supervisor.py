"""Many sagas, one or more workers over one store, virtual time: who runs what, and when."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.errors import Unavailable
from saga.model import Saga, SagaStatus
from saga.ports import CancelAccepted, Claimed, NewSaga, NoticesMissed, SagasDue, WorkflowAdded
from saga.service import StartSaga
from saga.supervisor import CLAIM_PAGE, Limits
from saga.workflow import OnUnknown
from tests.saga.at_work import admitted, logs_of, saga_of, settle, start, store_of, waiting_saga, worker_of
from tests.saga.samples import step, workflow
from tests.support.world import Worker, World, bug, hang, late, memory_store, ok, saga_id, seconds_of

S = SagaStatus
ONE_STEP = workflow(step("a", timeout_secs=600.0), timeout_secs=None)


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
