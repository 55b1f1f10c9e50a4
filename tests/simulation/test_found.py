"""What the simulation found, each as a story of its own: shorter than a seed, and it stays when the dice change."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from saga.errors import Unavailable
from saga.model import SagaStatus
from saga.ports import NewSaga
from saga.service import StartSaga
from saga.supervisor import Limits
from saga.workflow import RetryPolicy, Step, WorkflowDefinition
from tests.support.world import InterposedStore, Worker, World, hang, late, memory_store, saga_id

ONE_STEP = WorkflowDefinition(
    name="order", steps=(Step(name="pay", service="svc", method="Svc.Pay", compensate="Svc.Refund"),)
)
IN_A_HURRY = WorkflowDefinition(
    name="order",
    steps=(Step(name="pay", service="svc", method="Svc.Pay", timeout_secs=60, retry=RetryPolicy(max_attempts=1)),),
    timeout_secs=10,
)


async def unowned(store: InterposedStore, number: int = 1) -> str:
    """A saga in the store that nobody runs yet."""
    made = await store.port.create(
        NewSaga(saga_id=saga_id(number), workflow_name="order", workflow_version=1, payload={})
    )
    return made.saga.saga_id


async def test_the_deadline_runs_since_it_was_stored_though_the_answer_came_late(autojump_clock: MockClock) -> None:
    # Seed 6: the first move had landed, its answer took 6 s, and the saga had 6 s more than the row said.
    world = World({"pay": [hang()]})
    async with memory_store(world, IN_A_HURRY) as store:

        async def slow(_: object) -> None:
            store.after.pop("record")
            await trio.sleep(6)

        store.after["record"] = slow
        async with Worker(store.port, world).at_work() as worker:
            started = await worker.service.start(StartSaga(workflow_name="order"))
            ended = await worker.end_of(started.saga.saga_id)
    assert ended.status is SagaStatus.FAILED
    ((what, at),) = world.cut_off
    assert what == "pay"
    assert at == pytest.approx(10.0)


async def test_the_deadline_of_a_claimed_saga_runs_while_the_answer_to_the_claim_is_on_its_way(
    autojump_clock: MockClock,
) -> None:
    world = World({"pay": [hang()]})
    async with memory_store(world, IN_A_HURRY) as store:
        waiting = await unowned(store)
        async with Worker(store.port, world, name="w1").at_work():
            await world.until_called("pay")
        began = world.seen[0].at
        await store.port.remove_worker("w1")

        async def slow(_: object) -> None:
            store.after.pop("claim_due_sagas")
            await trio.sleep(6)

        store.after["claim_due_sagas"] = slow
        async with Worker(store.port, world, name="w2").at_work() as worker:
            await worker.end_of(waiting)
    what, at = world.cut_off[-1]
    assert what == "pay"
    assert at == pytest.approx(began + 10.0)


async def test_no_call_leaves_after_the_lease_was_lost_during_a_write(autojump_clock: MockClock) -> None:
    # Seed 0: the write was seen through, as it must be, and the run went on to call once more before it ended.
    world = World({"pay": [late(0.1)]})
    async with memory_store(world, ONE_STEP) as store:
        waiting = await unowned(store)

        async def outlast_the_lease(_: object) -> None:
            store.after.pop("record")
            with trio.CancelScope(shield=True):
                await trio.sleep(20)

        async def refuse(*_: object) -> None:
            raise Unavailable("away")

        store.after["record"] = outlast_the_lease
        store.before["renew_lease"] = refuse
        worker = Worker(store.port, world, limits=Limits(lease_secs=3.0))
        async with worker.at_work():
            await trio.sleep(30)
            del store.before["renew_lease"]
            await worker.end_of(waiting)
    epochs = [seen.call.epoch for seen in world.seen]
    assert epochs
    assert 1 not in epochs


async def test_a_store_that_goes_away_after_a_claim_puts_no_saga_aside(autojump_clock: MockClock) -> None:
    # Seed 30: the workflow could not be read, which counted as an error of our own: 30 s aside, outcome in doubt.
    world = World()
    async with memory_store(world, ONE_STEP) as store:
        waiting = await unowned(store)

        async def away_once(*_: object) -> None:
            store.before.pop("workflow")
            raise Unavailable("away")

        store.before["workflow"] = away_once
        async with Worker(store.port, world).at_work() as worker:
            ended = await worker.end_of(waiting)
            assert worker.meter.counts["crashed"] == 0
    assert ended.status is SagaStatus.COMPLETED
    assert world.seen[0].at < 5


async def test_freeing_what_nobody_runs_leaves_alone_what_is_created_meanwhile(autojump_clock: MockClock) -> None:
    # Seed 1069: the list was made, a saga was started and called, and only then did the list arrive.
    world = World({"pay": [late(20)]})
    async with memory_store(world, ONE_STEP) as store:
        worker = Worker(store.port, world)
        async with worker.at_work():
            await wait_all_tasks_blocked()  # it has looked for older ones: what is started now is its own

            async def lose_the_answer(_: object) -> None:
                store.after.pop("create")
                raise Unavailable("no answer")

            asked = trio.Event()

            async def slow(*_: object, **__: object) -> None:
                asked.set()
                await trio.sleep(2)

            store.after["create"] = lose_the_answer
            store.before["release"] = slow
            with pytest.raises(Unavailable):
                await worker.service.start(StartSaga(workflow_name="order"))
            with trio.fail_after(10):
                await asked.wait()
            started = await worker.service.start(StartSaga(workflow_name="order"))
            await worker.end_of(started.saga.saga_id)
    calls = [seen.call for seen in world.seen if seen.call.saga_id == started.saga.saga_id]
    assert [(call.attempt, call.step_name) for call in calls] == [(1, "pay")]


async def test_a_creation_that_is_answered_after_the_worker_stopped_is_left_to_others(
    autojump_clock: MockClock,
) -> None:
    world = World()
    async with memory_store(world, ONE_STEP) as store:
        worker = Worker(store.port, world, limits=Limits(shutdown_grace_secs=1.0))
        made: list[str] = []

        async def slow(_: object) -> None:
            store.after.pop("create")
            await trio.sleep(30)

        async def start() -> None:
            made.append((await worker.service.start(StartSaga(workflow_name="order"))).saga.saga_id)

        async with trio.open_nursery() as nursery:
            await nursery.start(worker.supervisor.run)
            await wait_all_tasks_blocked()
            store.after["create"] = slow
            nursery.start_soon(start)
            await wait_all_tasks_blocked()
            await worker.supervisor.drain()
        async with Worker(store.port, world, name="w2").at_work() as other:
            assert (await other.end_of(made[0])).status is SagaStatus.COMPLETED


async def test_a_lease_that_took_long_to_get_is_renewed_in_time(autojump_clock: MockClock) -> None:
    # Seed 1000054: most of the lease was over when the worker began, and it looked again only after a third of one.
    world = World({"pay": [late(5)]})
    async with memory_store(world, ONE_STEP) as store:
        waiting = await unowned(store)

        async def slow(_: object) -> None:
            for method in ("register_worker", "release_expired_workers"):
                store.after.pop(method)
            await trio.sleep(2.6)

        store.after = {"register_worker": slow, "release_expired_workers": slow}
        worker = Worker(store.port, world, limits=Limits(lease_secs=3.0))
        async with worker.at_work(), Worker(store.port, world, name="w2").at_work():
            await worker.end_of(waiting)
    assert len(world.seen) == 1


async def test_what_nobody_runs_is_freed_however_long_the_store_is_away_just_then(autojump_clock: MockClock) -> None:
    # Seed 6004492: the look that would have freed it failed, and by the next one it was no longer thought of.
    world = World()
    async with memory_store(world, ONE_STEP) as store:
        waiting = await unowned(store)

        async def lose_the_answer(_: object) -> None:
            store.after.pop("claim_due_sagas")
            raise Unavailable("no answer")

        async def away(*_: object, **__: object) -> None:
            if trio.current_time() < 300:
                raise Unavailable("away")

        store.after["claim_due_sagas"] = lose_the_answer
        store.before["release"] = away
        async with Worker(store.port, world).at_work() as worker:
            ended = await worker.end_of(waiting)
    assert ended.status is SagaStatus.COMPLETED
    assert 300 <= world.seen[0].at < 303


async def test_a_farewell_that_was_given_up_and_lands_late_frees_nothing_that_was_taken_since(
    autojump_clock: MockClock,
) -> None:
    # Seed 5001238 (there it was another write that freed all a worker owns): one saga had two callers.
    world = World({"pay": [hang(), late(20)]})
    async with memory_store(world, ONE_STEP) as store:
        waiting = await unowned(store)
        worker = Worker(store.port, world, limits=Limits(lease_secs=3.0))
        given_up: list[str] = []

        async def not_renewed(*_: object) -> None:
            await trio.sleep(60)

        async def unanswered(worker_id: str) -> None:
            store.before.clear()
            given_up.append(worker_id)
            raise Unavailable("no answer")

        store.before = {"renew_lease": not_renewed, "remove_worker": unanswered}
        async with worker.at_work():
            await world.until_called("pay", times=2)
            await store.port.remove_worker(given_up[0])
            freed = await store.port.release_expired_workers()
            ended = await worker.end_of(waiting)
    assert freed == 0
    assert ended.status is SagaStatus.COMPLETED
    assert [seen.call.epoch for seen in world.seen] == [1, 2]
