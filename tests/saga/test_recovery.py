"""Sagas go on from every stored state, at another worker or on another day."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.facts import Call, Fact
from saga.model import SagaStatus, StepAction
from saga.ports import NewSaga, Record, Recorded
from saga.transitions import advance, judge, next_command
from tests.saga.at_work import THREE, bring_to, logs_of, saga_of, start
from tests.saga.samples import AT, BEGAN, SENT, began, failed, patient, step, succeeded, undone, workflow
from tests.saga.samples import refused as refused_answer
from tests.support.world import InterposedStore, Worker, World, hang, memory_store, refuse, saga_id

S = SagaStatus
ONCE = patient(1)

HISTORIES: dict[str, tuple[list[Fact], list[str], SagaStatus]] = {
    "STARTED": ([], ["a", "b", "c"], S.COMPLETED),
    "RUNNING at the first step": ([began], ["a", "b", "c"], S.COMPLETED),
    "RUNNING at the second": ([began, succeeded()], ["b", "c"], S.COMPLETED),
    "RUNNING at the last": ([began, succeeded(), succeeded()], ["c"], S.COMPLETED),
    "COMPENSATING, two to go": ([began, succeeded(), succeeded(), failed()], ["undo b", "undo a"], S.FAILED),
    "COMPENSATING, one to go": ([began, succeeded(), succeeded(), failed(), undone()], ["undo a"], S.FAILED),
}


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
