"""One saga, one run, virtual time: what is called when, and what is remembered of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.errors import LeaseLost, RowRejected, Unavailable
from saga.model import Saga, SagaStatus
from saga.ports import Record, Recorded, SagaFilter
from saga.runner import SagaRun
from saga.workflow import Backoff, OnUnknown, WorkflowDefinition
from tests.saga.samples import patient, step, workflow
from tests.support.world import (
    Behaviour,
    InterposedStore,
    World,
    hang,
    late,
    lone_run,
    lose_reply,
    memory_store,
    ok,
    refuse,
    retry_info,
    saga_id,
    seconds_of,
    told,
    twice,
    unreachable,
)

S = SagaStatus
QUICK = patient(3, initial_interval_ms=1000)
ONCE = patient(1)


class Stage:
    """A run, its world and its store."""

    def __init__(self, run: SagaRun, world: World, store: InterposedStore) -> None:
        self.run = run
        self.world = world
        self.store = store

    async def saga(self) -> Saga:
        found = await self.store.port.get(saga_id(1))
        assert found is not None
        return found

    async def logs(self) -> list[str]:
        return told(await self.store.port.step_logs(saga_id(1)))

    async def request_cancel(self) -> None:
        """As the service does it: durable first, then told."""
        await self.store.port.request_cancel_unless_terminal(saga_id(1))
        self.run.request_cancel()


@asynccontextmanager
async def stage(
    definition: WorkflowDefinition, script: dict[str, list[Behaviour]] | None = None, **engine: Any
) -> AsyncIterator[Stage]:
    world = World(script)
    async with memory_store(world) as store:
        yield Stage(await lone_run(store.port, world, definition, **engine), world, store)


# --- forward and back ------------------------------------------------------------------------------------------------


async def test_a_saga_whose_steps_all_succeed_completes(autojump_clock: MockClock) -> None:
    async with stage(workflow(), {"b": [ok({"id": 9})]}) as at:
        await at.run.run()
        saga = await at.saga()
        assert (saga.status, saga.current_step, saga.error_message) == (S.COMPLETED, 3, None)
        assert at.world.story == [("a", 0.0), ("b", 0.0), ("c", 0.0)]
        assert await at.logs() == ["a EXECUTE SUCCESS x1", "b EXECUTE SUCCESS x1", "c EXECUTE SUCCESS x1"]
        assert (await at.store.port.step_logs(saga_id(1)))[1].response_payload == {"id": 9}


async def test_a_step_that_fails_has_the_ones_before_it_undone_in_reverse(autojump_clock: MockClock) -> None:
    async with stage(workflow(), {"c": [refuse("FAILED_PRECONDITION", "card declined")]}) as at:
        await at.run.run()
        saga = await at.saga()
        assert saga.status is S.FAILED
        assert saga.error_message == "step c failed: FAILED_PRECONDITION: card declined"
        assert saga.current_step == 2
        assert at.world.order == ["a", "b", "c", "undo b", "undo a"]
        assert await at.logs() == [
            "a EXECUTE SUCCESS x1",
            "b EXECUTE SUCCESS x1",
            "c EXECUTE FAILED x1",
            "b COMPENSATE SUCCESS x1",
            "a COMPENSATE SUCCESS x1",
        ]


async def test_a_saga_that_is_over_is_left_as_it_is(autojump_clock: MockClock) -> None:
    async with stage(workflow()) as at:
        await at.run.run()
        before = await at.saga()
        await at.run.run()
        assert len(at.world.seen) == 3
        assert await at.saga() == before


async def test_a_call_carries_what_a_participant_needs_to_know(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", input={"item": "payload.sku"}), step("b", retry=QUICK, timeout_secs=7.0))
    async with stage(definition, {"b": [refuse("ABORTED"), ok()]}, payload={"sku": "x"}) as at:
        await at.run.run()
        a, b1, b2 = (seen.call for seen in at.world.seen)
        assert (a.service, a.method, a.request, a.strict) == ("svc", "Svc.A", {"item": "x"}, True)
        assert (b1.request, b1.strict, b1.timeout_secs) == ({"sku": "x"}, False, 7.0)
        assert (a.idempotency_key, b1.idempotency_key) == (f"{saga_id(1)}:0:execute", f"{saga_id(1)}:1:execute")
        assert b1.idempotency_key == b2.idempotency_key
        assert ((b1.attempt, b2.attempt), (b1.epoch, b2.epoch)) == ((1, 2), (1, 1))
        assert b1.traceparent != b2.traceparent
        assert b1.traceparent[:35] == b2.traceparent[:35] == f"00-{saga_id(1).replace('-', '')}"


async def test_a_later_step_is_built_from_an_earlier_response(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", input={"of": "steps.a.response.id"}))
    async with stage(definition, {"a": [ok({"id": 5})]}) as at:
        await at.run.run()
        assert at.world.seen[1].call.request == {"of": 5}


async def test_a_request_that_cannot_be_built_fails_the_step_at_once_and_calls_nobody(
    autojump_clock: MockClock,
) -> None:
    definition = workflow(step("a"), step("b", input="payload.missing", retry=QUICK))
    async with stage(definition) as at:
        await at.run.run()
        assert at.world.order == ["a", "undo a"]
        saga = await at.saga()
        assert saga.status is S.FAILED
        assert (saga.error_message or "").startswith("step b failed: INVALID_ARGUMENT: input")
        assert await at.logs() == ["a EXECUTE SUCCESS x1", "b EXECUTE FAILED x1", "a COMPENSATE SUCCESS x1"]


# --- attempts and pauses ---------------------------------------------------------------------------------------------


async def test_an_attempt_is_cut_off_exactly_at_its_timeout(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a", timeout_secs=4.0, retry=ONCE)), {"a": [hang()]}) as at:
        await at.run.run()
        assert at.world.cut_off == [("a", 4.0)]
        assert await at.logs() == ["a EXECUTE TIMEOUT x1"]
        assert (await at.saga()).error_message == "step a failed: DEADLINE_EXCEEDED: no answer within 4 s"


async def test_an_answer_just_in_time_counts(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a", timeout_secs=4.0, retry=ONCE)), {"a": [late(3.999)]}) as at:
        await at.run.run()
        assert (await at.saga()).status is S.COMPLETED


@pytest.mark.parametrize(
    ("backoff", "instants"),
    [
        (Backoff.EXPONENTIAL, [0.0, 1.0, 3.0, 7.0]),
        (Backoff.LINEAR, [0.0, 1.0, 3.0, 6.0]),
        (Backoff.CONSTANT, [0.0, 1.0, 2.0, 3.0]),
    ],
)
async def test_retries_come_at_the_instants_of_their_backoff(
    backoff: Backoff, instants: list[float], autojump_clock: MockClock
) -> None:
    definition = workflow(step("a", retry=patient(4, backoff=backoff)))
    async with stage(definition, {"a": [refuse("ABORTED")]}) as at:
        await at.run.run()
        assert at.world.story == [("a", instant) for instant in instants]
        assert await at.logs() == ["a EXECUTE FAILED x4"]


async def test_each_action_is_logged_from_its_own_first_attempt_to_its_end(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=patient(initial_interval_ms=1_000)), step("c"))
    script = {"a": [late(2.0)], "b": [refuse("ABORTED"), late(3.0)], "c": [refuse()], "undo b": [late(4.0)]}
    async with stage(definition, script) as at:
        await at.run.run()
        spans = [
            (seconds_of(log.started_at), seconds_of(log.completed_at))
            for log in await at.store.step_logs(at.run.saga.saga_id)
        ]
        assert spans == [(0.0, 2.0), (2.0, 6.0), (6.0, 6.0), (6.0, 10.0), (10.0, 10.0)]


async def test_retries_of_attempts_that_time_out_count_from_the_end_of_the_attempt(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a", timeout_secs=5.0, retry=QUICK)), {"a": [hang(), hang(), ok()]}) as at:
        await at.run.run()
        assert at.world.story == [("a", 0.0), ("a", 6.0), ("a", 13.0)]
        (log,) = await at.store.port.step_logs(saga_id(1))
        assert (log.attempts, seconds_of(log.started_at), seconds_of(log.completed_at)) == (3, 0.0, 13.0)


async def test_each_step_counts_its_attempts_anew(autojump_clock: MockClock) -> None:
    script = {"a": [refuse("ABORTED"), ok()], "b": [refuse("ABORTED"), refuse("ABORTED"), ok()]}
    async with stage(workflow(step("a", retry=QUICK), step("b", retry=QUICK)), script) as at:
        await at.run.run()
        assert at.world.story == [("a", 0.0), ("a", 1.0), ("b", 1.0), ("b", 2.0), ("b", 4.0)]
        assert [seen.call.attempt for seen in at.world.seen] == [1, 2, 1, 2, 3]


async def test_the_pause_a_participant_asks_for_is_kept_to_the_second(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a", retry=QUICK)), {"a": [retry_info(17.5), ok()]}) as at:
        await at.run.run()
        assert at.world.story == [("a", 0.0), ("a", 17.5)]


async def test_a_participant_that_is_away_is_tried_again(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a", retry=QUICK)), {"a": [unreachable(), unreachable(), ok()]}) as at:
        await at.run.run()
        assert ((await at.saga()).status, len(at.world.seen)) == (S.COMPLETED, 3)


async def test_a_final_code_is_not_tried_again(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a", retry=QUICK)), {"a": [refuse("INVALID_ARGUMENT")]}) as at:
        await at.run.run()
        assert at.world.story == [("a", 0.0)]


# --- lost, late and doubled answers ----------------------------------------------------------------------------------


async def test_a_lost_reply_is_asked_for_again_with_the_same_key_and_has_one_effect(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a", retry=QUICK)), {"a": [lose_reply(), ok()]}) as at:
        await at.run.run()
        assert (await at.saga()).status is S.COMPLETED
        assert len(at.world.seen) == 2
        assert at.world.effects == {f"{saga_id(1)}:0:execute": 1}


@pytest.mark.parametrize(
    ("on_unknown", "order"),
    [(OnUnknown.SKIP, ["a", "b", "undo a"]), (OnUnknown.COMPENSATE, ["a", "b", "undo b", "undo a"])],
)
async def test_a_reply_that_stays_lost_is_undone_only_if_the_workflow_asks_for_it(
    on_unknown: OnUnknown, order: list[str], autojump_clock: MockClock
) -> None:
    definition = workflow(step("a"), step("b", retry=ONCE, on_unknown=on_unknown))
    async with stage(definition, {"b": [lose_reply()]}) as at:
        await at.run.run()
        assert at.world.order == order
        assert (await at.saga()).status is S.FAILED


async def test_an_effect_of_an_early_attempt_is_undone_though_the_last_one_was_refused(
    autojump_clock: MockClock,
) -> None:
    definition = workflow(step("a", retry=QUICK, on_unknown=OnUnknown.COMPENSATE))
    async with stage(definition, {"a": [hang(works=True), refuse("ALREADY_EXISTS")]}) as at:
        await at.run.run()
        assert at.world.order == ["a", "a", "undo a"]


async def test_a_request_delivered_twice_has_one_effect(autojump_clock: MockClock) -> None:
    async with stage(workflow(), {"b": [twice()]}) as at:
        await at.run.run()
        assert (await at.saga()).status is S.COMPLETED
        assert set(at.world.effects.values()) == {1}


# --- compensation ----------------------------------------------------------------------------------------------------


async def test_a_compensation_is_retried_by_its_own_policy(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", compensate_retry=patient(3, initial_interval_ms=500)), step("b", retry=ONCE))
    async with stage(definition, {"b": [refuse()], "undo a": [refuse("ABORTED"), refuse("ABORTED"), ok()]}) as at:
        await at.run.run()
        assert at.world.story[2:] == [("undo a", 0.0), ("undo a", 0.5), ("undo a", 1.5)]
        saga = await at.saga()
        assert (saga.status, saga.compensation_failed) == (S.FAILED, False)


@pytest.mark.parametrize(
    ("behaviour", "status"), [(refuse("ABORTED"), "FAILED"), (hang(), "TIMEOUT"), (refuse("NOT_FOUND"), "FAILED")]
)
async def test_a_compensation_that_fails_for_good_does_not_stop_the_ones_before_it(
    behaviour: Behaviour, status: str, autojump_clock: MockClock
) -> None:
    definition = workflow(
        step("a"), step("b", timeout_secs=2.0, compensate_retry=ONCE), step("c", retry=ONCE), timeout_secs=None
    )
    async with stage(definition, {"c": [refuse()], "undo b": [behaviour]}) as at:
        await at.run.run()
        assert at.world.order == ["a", "b", "c", "undo b", "undo a"]
        assert (await at.logs())[3:] == [f"b COMPENSATE {status} x1", "a COMPENSATE SUCCESS x1"]
        saga = await at.saga()
        assert (saga.status, saga.compensation_failed, saga.undo_failed) == (S.FAILED, True, (1,))
        page = await at.store.port.list_sagas(SagaFilter(compensation_failed=True), limit=10)
        assert [found.saga_id for found in page.sagas] == [saga_id(1)]


async def test_the_deadline_of_the_workflow_does_not_touch_compensations(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=ONCE), timeout_secs=5.0)
    async with stage(definition, {"b": [refuse(after_secs=4.0)], "undo a": [late(20.0)]}) as at:
        await at.run.run()
        assert at.world.cut_off == []
        assert at.world.clock.seconds() == 24.0
        assert (await at.saga()).compensation_failed is False


# --- the deadline of the workflow ------------------------------------------------------------------------------------


async def test_the_deadline_cuts_off_a_call(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b"), timeout_secs=10.0)
    async with stage(definition, {"a": [late(4.0)], "b": [hang()]}) as at:
        await at.run.run()
        assert at.world.cut_off == [("b", 10.0)]
        assert at.world.seen[1].call.timeout_secs == 6.0
        assert at.world.order == ["a", "b", "undo a"]
        saga = await at.saga()
        assert (saga.status, saga.error_message) == (
            S.FAILED,
            "the workflow's deadline of 10 s passed during step b",
        )
        assert "b EXECUTE TIMEOUT x1" in await at.logs()


async def test_a_participant_that_keeps_the_deadline_itself_changes_nothing(autojump_clock: MockClock) -> None:
    """It gets the deadline we keep, so its DEADLINE_EXCEEDED may come in the same instant."""
    definition = workflow(step("a", retry=QUICK), timeout_secs=10.0)
    answer = Behaviour(answer=lose_reply().answer, after_secs=10.0)
    assert answer.answer is not None

    timed_out = msgspec.structs.replace(answer, answer=msgspec.structs.replace(answer.answer, code="DEADLINE_EXCEEDED"))
    async with stage(definition, {"a": [timed_out]}) as at:
        await at.run.run()
        assert len(at.world.seen) == 1
        assert (await at.saga()).error_message == "the workflow's deadline of 10 s passed during step a"


async def test_the_deadline_ends_a_pause(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=patient(3, initial_interval_ms=20_000)), timeout_secs=10.0)
    async with stage(definition, {"b": [refuse("ABORTED")]}) as at:
        await at.run.run()
        assert at.world.story == [("a", 0.0), ("b", 0.0), ("undo a", 10.0)]
        assert "b EXECUTE TIMEOUT x1" in await at.logs()


async def test_the_deadline_between_two_steps_stops_the_next_one(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", timeout_secs=100.0), step("b"), timeout_secs=10.0)

    async with stage(definition, {"a": [late(9.0)]}) as at:

        async def slow_commit(recorded: Recorded) -> None:
            if recorded.saga.status is S.RUNNING and recorded.saga.current_step == 1:
                await trio.sleep(3.0)

        at.store.after["record"] = slow_commit
        await at.run.run()
        assert at.world.story == [("a", 0.0), ("undo a", 12.0)]
        assert await at.logs() == ["a EXECUTE SUCCESS x1", "a COMPENSATE SUCCESS x1"]
        assert (await at.saga()).error_message == "the workflow's deadline of 10 s passed"


async def test_a_success_in_the_instant_of_the_deadline_is_a_success(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a"), timeout_secs=10.0), {"a": [late(9.999)]}) as at:
        await at.run.run()
        assert (await at.saga()).status is S.COMPLETED


# --- cancel ----------------------------------------------------------------------------------------------------------


async def test_a_cancel_reaches_the_call_in_flight_at_once(autojump_clock: MockClock) -> None:
    async with stage(workflow(), {"b": [hang()]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await at.world.until_called("b")
        await at.request_cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert at.world.cut_off == [("b", 0.0)]
        assert at.world.clock.seconds() == 0.0
        assert (await at.saga()).status is S.CANCELLED
        assert at.world.order == ["a", "b", "undo a"]
        assert await at.logs() == ["a EXECUTE SUCCESS x1", "b EXECUTE FAILED x1", "a COMPENSATE SUCCESS x1"]


async def test_a_call_cut_off_by_a_cancel_is_told_as_cancelled_though_it_was_the_last_attempt(
    autojump_clock: MockClock,
) -> None:
    definition = workflow(step("a"), step("b", retry=patient(max_attempts=1)))
    async with stage(definition, {"b": [hang()]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await at.world.until_called("b")
        await at.request_cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert (await at.saga()).error_message == "cancelled during step b"
        assert await at.logs() == ["a EXECUTE SUCCESS x1", "b EXECUTE FAILED x1", "a COMPENSATE SUCCESS x1"]


async def test_a_cancel_ends_a_pause_at_once(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=patient(initial_interval_ms=20_000)))
    async with stage(definition, {"b": [refuse("ABORTED")]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await trio.sleep(8.0)
        await at.request_cancel()
        await trio.testing.wait_all_tasks_blocked()
        saga = await at.saga()
        assert (saga.status, seconds_of(saga.updated_at)) == (S.CANCELLED, 8.0)
        assert at.world.story == [("a", 0.0), ("b", 0.0), ("undo a", 8.0)]


async def test_a_compensation_is_not_stopped_by_a_cancel_which_names_the_end(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b"), step("c", retry=ONCE))
    script = {"c": [refuse()], "undo b": [late(5.0)], "undo a": [refuse("ABORTED"), late(5.0)]}
    async with stage(definition, script) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await trio.sleep(2.0)
        await at.request_cancel()
        await trio.sleep(10.0)
        assert at.world.cut_off == []
        assert at.world.story[3:] == [("undo b", 0.0), ("undo a", 5.0), ("undo a", 6.0)]
        assert (await at.saga()).status is S.CANCELLED


async def test_a_cancel_during_the_very_last_compensation_still_names_the_end(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=ONCE))
    script = {"b": [refuse()], "undo a": [late(5.0)]}
    async with stage(definition, script) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await trio.sleep(2.0)
        await at.request_cancel()
        await trio.sleep(4.0)
        assert at.world.cut_off == []
        assert (await at.saga()).status is S.CANCELLED


async def test_a_cancel_that_another_worker_accepted_names_the_end_too(autojump_clock: MockClock) -> None:
    """The request is in the row alone; the last move must not pass it by."""
    definition = workflow(step("a"), step("b", retry=ONCE))
    async with (
        stage(definition, {"b": [refuse()], "undo a": [late(5.0)]}) as at,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(at.run.run)
        await trio.sleep(2.0)
        await at.store.port.request_cancel_unless_terminal(saga_id(1))
        await trio.sleep(4.0)
        assert (await at.saga()).status is S.CANCELLED


async def test_a_cancel_that_meets_a_failure_without_anything_to_undo_names_the_end(autojump_clock: MockClock) -> None:
    async with (
        stage(workflow(step("a", retry=ONCE)), {"a": [refuse(after_secs=5.0)]}) as at,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(at.run.run)
        await trio.sleep(2.0)
        await at.store.port.request_cancel_unless_terminal(saga_id(1))
        await trio.sleep(4.0)
        saga = await at.saga()
        assert (saga.status, saga.error_message) == (S.CANCELLED, "step a failed: FAILED_PRECONDITION: no")


async def test_a_cancel_before_the_last_success_is_written_undoes_it(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a"), step("b"))) as at:

        async def cancel_first(record: Record) -> None:
            if record.after.status is S.COMPLETED:
                del at.store.before["record"]
                await at.store.port.request_cancel_unless_terminal(saga_id(1))

        at.store.before["record"] = cancel_first
        await at.run.run()
        assert (await at.saga()).status is S.CANCELLED
        assert at.world.order == ["a", "b", "undo b", "undo a"]
        assert await at.logs() == [
            "a EXECUTE SUCCESS x1",
            "b EXECUTE SUCCESS x1",
            "b COMPENSATE SUCCESS x1",
            "a COMPENSATE SUCCESS x1",
        ]


async def test_a_cancel_after_the_last_success_was_written_comes_too_late(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a"), step("b"))) as at:
        answered: list[Saga | None] = []

        async def cancel_after(recorded: Recorded) -> None:
            if recorded.saga.status is S.COMPLETED:
                answered.append(await at.store.port.request_cancel_unless_terminal(saga_id(1)))
                at.run.request_cancel()

        at.store.after["record"] = cancel_after
        await at.run.run()
        saga = await at.saga()
        assert (saga.status, saga.cancel_requested) == (S.COMPLETED, False)
        assert [found.status for found in answered if found] == [S.COMPLETED]
        assert at.world.order == ["a", "b"]


async def test_a_cancel_before_the_first_step_calls_nobody(autojump_clock: MockClock) -> None:
    async with stage(workflow()) as at:
        await at.request_cancel()
        await at.run.run()
        assert (await at.saga()).status is S.CANCELLED
        assert at.world.seen == []


async def test_a_cancelled_call_that_may_have_worked_is_undone_first_if_asked_for(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", on_unknown=OnUnknown.COMPENSATE))
    async with stage(definition, {"b": [hang(works=True)]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await at.world.until_called("b")
        await at.request_cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert at.world.order == ["a", "b", "undo b", "undo a"]


# --- parking ---------------------------------------------------------------------------------------------------------


async def test_a_long_pause_leaves_memory_and_a_short_one_does_not(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", retry=patient(3, initial_interval_ms=30_000)), timeout_secs=None)
    async with stage(definition, {"a": [refuse("ABORTED")]}, park_after_secs=30.0) as at:
        await at.run.run()
        saga = await at.saga()
        assert at.world.story == [("a", 0.0), ("a", 30.0)]  # 30 s are waited for here, 60 s are not
        assert at.world.clock.seconds() == 30.0
        assert (saga.status, saga.owner, saga.attempt) == (S.RUNNING, None, 3)
        assert seconds_of(saga.next_attempt_at) == 90.0


async def test_a_parked_saga_is_woken_by_its_deadline_when_that_comes_first(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", retry=patient(3, initial_interval_ms=90_000)), timeout_secs=50.0)
    async with stage(definition, {"a": [refuse("ABORTED")]}) as at:
        await at.run.run()
        saga = await at.saga()
        assert saga.owner is None
        assert 50.0 <= seconds_of(saga.next_attempt_at) < 50.1


async def test_a_cancel_that_came_before_the_parking_is_not_put_off(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", retry=patient(3, initial_interval_ms=90_000)), timeout_secs=None)
    async with stage(definition, {"a": [refuse("ABORTED", after_secs=2.0)]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await trio.sleep(1.0)
        await at.store.port.request_cancel_unless_terminal(saga_id(1))  # by another worker
        await trio.sleep(1.5)
        saga = await at.saga()
        assert (saga.status, saga.owner, saga.next_attempt_at) == (S.RUNNING, None, None)


# --- the store is away, or refuses -----------------------------------------------------------------------------------


async def test_a_store_that_is_away_stalls_the_saga_and_nothing_is_called_twice(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a"), step("b"), timeout_secs=None)) as at, trio.open_nursery() as nursery:

        async def leave(recorded: Recorded) -> None:
            if recorded.saga.current_step == 0:
                at.store.away = True

        at.store.after["record"] = leave
        nursery.start_soon(at.run.run)
        await trio.sleep(60.0)
        assert at.world.order == ["a"]
        at.store.away = False
        await trio.sleep(5.0)
        assert at.world.order == ["a", "b"]
        assert (await at.saga()).status is S.COMPLETED
        first, _ = await at.store.port.step_logs(saga_id(1))
        # The log tells when the action ended, not when the store was back.
        assert seconds_of(first.completed_at) == 0.0


async def test_a_write_that_landed_though_its_answer_was_lost_is_not_made_twice(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a"), step("b"))) as at:
        lost: list[SagaStatus] = []

        async def lose(recorded: Recorded) -> None:
            if len(lost) < 10 and (not lost or lost[-1] is not recorded.saga.status or len(lost) % 2 == 0):
                lost.append(recorded.saga.status)
                raise Unavailable("the answer of the database was lost")
            lost.append(recorded.saga.status)

        at.store.after["record"] = lose
        await at.run.run()
        assert (await at.saga()).status is S.COMPLETED
        assert at.world.order == ["a", "b"]
        assert await at.logs() == ["a EXECUTE SUCCESS x1", "b EXECUTE SUCCESS x1"]
        assert (await at.saga()).revision == 3


async def test_a_parking_that_landed_though_its_answer_was_lost_lets_go(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", retry=patient(3, initial_interval_ms=90_000)), timeout_secs=None)
    async with stage(definition, {"a": [refuse("ABORTED")]}) as at:

        async def lose(recorded: Recorded) -> None:
            if recorded.saga.owner is None:
                del at.store.after["record"]
                raise Unavailable("the answer of the database was lost")

        at.store.after["record"] = lose
        await at.run.run()
        assert (await at.saga()).owner is None
        assert len(at.world.seen) == 1


async def test_an_answer_no_database_takes_does_not_stop_the_saga(autojump_clock: MockClock) -> None:
    async with stage(workflow(step("a"), step("b")), {"a": [ok({"half": "\ud800"})]}) as at:
        await at.run.run()
        assert (await at.saga()).status is S.COMPLETED
        first, second = await at.store.port.step_logs(saga_id(1))
        assert (first.response_payload, first.request_payload) == (None, None)
        assert first.error_message == "the payloads of this attempt could not be stored"
        assert second.error_message is None


async def test_a_row_that_is_refused_without_payloads_too_is_our_bug_and_is_raised(autojump_clock: MockClock) -> None:
    async with stage(workflow()) as at:

        async def refuse_row(record: Record) -> None:
            raise RowRejected("whatever it is")

        at.store.before["record"] = refuse_row
        with pytest.raises(RowRejected):
            await at.run.run()


@pytest.mark.parametrize("heir", ["w2", "w1"])
async def test_a_run_whose_saga_has_changed_hands_writes_nothing(heir: str, autojump_clock: MockClock) -> None:
    """Also when it came back to a worker of the same name: the epoch tells them apart."""
    async with stage(workflow(), {"a": [late(5.0)]}) as at, trio.open_nursery() as nursery:
        lost: list[LeaseLost] = []

        async def run() -> None:
            try:
                await at.run.run()
            except LeaseLost as error:
                lost.append(error)

        nursery.start_soon(run)
        await at.world.until_called("a")
        await at.store.port.remove_worker("w1")
        (claimed,) = await at.store.port.claim_due_sagas(heir, 1)
        await trio.sleep(6.0)
        assert [error.saga_id for error in lost] == [saga_id(1)]
        assert await at.saga() == claimed.saga
        assert (claimed.saga.epoch, claimed.saga.owner, claimed.saga.outcome_unknown) == (2, heir, True)
        assert await at.logs() == []


# --- stopping --------------------------------------------------------------------------------------------------------


async def test_a_stop_lets_the_running_attempt_finish_and_frees_the_saga(autojump_clock: MockClock) -> None:
    async with stage(workflow(), {"a": [late(5.0)]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await trio.sleep(1.0)
        at.run.stop()
        await trio.sleep(5.0)
        saga = await at.saga()
        assert (saga.status, saga.current_step, saga.owner, saga.outcome_unknown) == (S.RUNNING, 1, None, False)
        assert at.world.story == [("a", 0.0)]


async def test_a_stop_ends_a_pause_which_is_kept_by_the_next_owner(autojump_clock: MockClock) -> None:
    definition = workflow(step("a", retry=patient(initial_interval_ms=20_000)))
    async with stage(definition, {"a": [refuse("ABORTED")]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await trio.sleep(5.0)
        at.run.stop()
        await trio.testing.wait_all_tasks_blocked()
        saga = await at.saga()
        assert (saga.owner, saga.attempt, seconds_of(saga.next_attempt_at)) == (None, 2, 20.0)


async def test_a_stop_does_not_put_off_a_cancel(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b", retry=patient(initial_interval_ms=20_000)))
    async with stage(definition, {"b": [refuse("ABORTED")]}) as at, trio.open_nursery() as nursery:
        nursery.start_soon(at.run.run)
        await trio.sleep(5.0)
        await at.request_cancel()
        at.run.stop()
        await trio.testing.wait_all_tasks_blocked()
        saga = await at.saga()
        assert (saga.status, saga.owner, saga.next_attempt_at) == (S.COMPENSATING, None, None)
