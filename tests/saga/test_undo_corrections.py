"""What an operator corrects about failed compensations: how it is read, and what becomes of it under virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.audit import MAX_REASON
from saga.errors import Conflict, Detail, Invalid, PayloadTooLarge, Unavailable
from saga.model import Json, Saga, SagaStatus, StepAction, UndoCorrection
from saga.ports import Record, Recorded
from saga.service import StartSaga
from saga.undo_corrections import read_corrections
from tests.saga.samples import patient, step, workflow
from tests.support.world import (
    Behaviour,
    InterposedStore,
    Worker,
    World,
    late,
    memory_store,
    ok,
    refuse,
    told,
    unreachable,
)

S = SagaStatus
ONCE = patient(1)
STEPS = workflow(
    step("a", compensate_retry=ONCE), step("b", compensate_retry=patient(2)), step("c", compensate_retry=ONCE),
    step("d", retry=ONCE),
)  # fmt: skip
"""a, b and c can be undone; d is the step that fails."""
CORRECTED: Json = {"receipt": "r-7"}
BY_HAND = {"mark_done": True, "reason": "refunded at the desk"}
ALL_FAIL: dict[str, list[Behaviour]] = {
    "d": [refuse()],
    "undo a": [refuse("NOT_FOUND"), ok()],
    "undo b": [refuse("NOT_FOUND"), ok()],
    "undo c": [refuse("NOT_FOUND"), ok()],
}
"""Each undo fails for good the first time it is asked for, and works the second time."""


# --- how it is read --------------------------------------------------------------------------------------------------


def read(steps: Mapping[str, Any], undo_failed: tuple[int, ...] = (1, 0)) -> dict[int, UndoCorrection]:
    return read_corrections(steps, STEPS, undo_failed, 100)


def faults(steps: Mapping[str, Any], kind: type[Invalid] = Invalid) -> set[tuple[str, str]]:
    with pytest.raises(Invalid) as caught:
        read(steps)
    assert type(caught.value) is kind
    details: tuple[Detail, ...] = caught.value.details
    assert all(detail.message for detail in details)
    return {(detail.field, detail.reason) for detail in details}


def test_a_correction_is_a_request_or_a_mark_with_a_reason() -> None:
    assert read({}) == {}
    assert read({"a": {"input": CORRECTED}, "b": BY_HAND}) == {
        0: UndoCorrection(request=CORRECTED),
        1: UndoCorrection(reason="refunded at the desk"),
    }
    assert read({"a": {"input": {}, "reason": " 伝票の\u3000誤り\n#4711 "}}) == {
        0: UndoCorrection(request={}, reason="伝票の\u3000誤り\n#4711")
    }


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (None, {("steps.a", "type")}),
        ([], {("steps.a", "type")}),
        ({}, {("steps.a", "required")}),
        ({"reason": "x"}, {("steps.a", "required")}),
        ({"input": []}, {("steps.a.input", "type")}),
        ({"input": None}, {("steps.a.input", "type")}),
        ({"input": "x"}, {("steps.a.input", "type")}),
        ({"input": {}, "mark_done": True, "reason": "x"}, {("steps.a", "both")}),
        ({"mark_done": True}, {("steps.a.reason", "required")}),
        ({"mark_done": True, "reason": ""}, {("steps.a.reason", "length")}),
        ({"mark_done": True, "reason": " \n"}, {("steps.a.reason", "length")}),
        ({"mark_done": True, "reason": "x" * (MAX_REASON + 1)}, {("steps.a.reason", "length")}),
        ({"mark_done": True, "reason": "a\x00b"}, {("steps.a.reason", "characters")}),
        ({"mark_done": True, "reason": "a\ud800b"}, {("steps.a.reason", "characters")}),
        ({"mark_done": True, "reason": None}, {("steps.a.reason", "type")}),
        ({"mark_done": False, "reason": "x"}, {("steps.a.mark_done", "type")}),
        ({"mark_done": 1, "reason": "x"}, {("steps.a.mark_done", "type")}),
        ({"inptu": {}, "reason": "x"}, {("steps.a", "required"), ("steps.a.inptu", "unknown")}),
        ({"input": {"x": "a\x00"}}, {("steps.a.input", "nul_character")}),
        ({"input": {"x": "\ud800"}}, {("steps.a.input", "not_json")}),
    ],
)  # fmt: skip
def test_each_fault_is_told_by_its_path(entry: object, found: set[tuple[str, str]]) -> None:
    assert faults({"a": entry}) == found


def test_all_faults_of_all_steps_are_told_at_once() -> None:
    assert faults(
        {
            "a": {"input": 7, "note": ""},
            "b": {"mark_done": True},
            "c": BY_HAND,
            "e": {"input": {}},
            "e\nf": {},
        }
    ) == {
        ("steps.a.input", "type"),
        ("steps.a.note", "unknown"),
        ("steps.b.reason", "required"),
        ("steps.c", "not_failed"),
        ("steps.e", "unknown"),
        ("steps.?", "unknown"),
        ("steps.?", "required"),
    }


def test_an_input_has_the_bounds_of_a_payload() -> None:
    deep: Json = {}
    for _ in range(100):
        deep = {"x": deep}
    assert faults({"a": {"input": deep}}) == {("steps.a.input", "too_deep")}
    large: Json = {"x": "y" * 100}
    assert faults({"a": {"input": large}, "b": {"input": large}}, PayloadTooLarge) == {
        ("steps.a.input", "too_large"),
        ("steps.b.input", "too_large"),
    }
    assert faults({"a": {"input": large}, "b": {}}) == {("steps.a.input", "too_large"), ("steps.b", "required")}


# --- what becomes of it ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def ended_badly(script: Mapping[str, list[Behaviour]]) -> AsyncIterator[tuple[Worker, Saga]]:
    """A worker, and a saga of it whose undos of c, b and a have all failed."""
    world = World(script)
    async with memory_store(world, STEPS) as store:
        worker = Worker(store.port, world, park_after_secs=1000.0)
        async with worker.at_work():
            started = await worker.service.start(StartSaga(workflow_name="order", payload={"order": 7}))
            saga = await worker.end_of(started.saga.saga_id)
            assert (saga.status, saga.undo_failed, saga.compensation_failed) == (S.FAILED, (2, 1, 0), True)
            world.seen.clear()
            yield worker, saga


async def logs(worker: Worker, saga: Saga) -> list[tuple[str, Json | None, str | None]]:
    """What the last run wrote: line, request, message."""
    found = await worker.store.step_logs(saga.saga_id)
    return [
        (line, log.request_payload, log.error_message)
        for line, log in list(zip(told(found), found, strict=True))[7:]
    ]  # fmt: skip


async def test_a_corrected_request_is_sent_and_another_step_marked_done_is_not_called(
    autojump_clock: MockClock,
) -> None:
    async with ended_badly(ALL_FAIL) as (worker, saga):
        again = await worker.service.retry_compensation(
            saga.saga_id, {"a": {"input": CORRECTED, "reason": "typo"}, "c": BY_HAND}
        )
        # c is done already, in the write that was answered.
        assert (again.status, again.undo_plan, again.undo_corrections) == (
            S.COMPENSATING,
            (1, 0),
            {0: UndoCorrection(request=CORRECTED, reason="typo")},
        )
        over = await worker.end_of(saga.saga_id)
        assert (over.status, over.compensation_failed, over.undo_corrections) == (S.FAILED, False, {})
        calls = [seen.call for seen in worker.world.seen]
        assert [(call.step_name, call.request, call.strict, call.attempt) for call in calls] == [
            ("b", {"order": 7}, False, 1),
            ("a", CORRECTED, True, 1),
        ]
        # The same action of the same saga, so the key of the first run.
        assert calls[1].idempotency_key == f"{saga.saga_id}:0:compensate"
        assert await logs(worker, saga) == [
            ("c COMPENSATE SUCCESS x0", None, "done by hand: refunded at the desk"),
            ("b COMPENSATE SUCCESS x1", {"order": 7}, None),
            ("a COMPENSATE SUCCESS x1", CORRECTED, "request corrected: typo"),
        ]


async def test_every_attempt_of_the_run_sends_the_corrected_request(autojump_clock: MockClock) -> None:
    script = {**ALL_FAIL, "undo b": [refuse("NOT_FOUND"), unreachable(), ok()]}
    async with ended_badly(script) as (worker, saga):
        await worker.service.retry_compensation(saga.saga_id, {"b": {"input": CORRECTED}, "a": BY_HAND, "c": BY_HAND})
        await worker.end_of(saga.saga_id)
        assert [(seen.call.request, seen.call.attempt) for seen in worker.world.seen] == [
            (CORRECTED, 1),
            (CORRECTED, 2),
        ]
        assert (await logs(worker, saga))[1] == ("b COMPENSATE SUCCESS x2", CORRECTED, None)


async def test_a_correction_that_fails_too_is_forgotten_by_the_next_run(autojump_clock: MockClock) -> None:
    script = {**ALL_FAIL, "undo a": [refuse("NOT_FOUND"), refuse("NOT_FOUND", "still"), ok()]}
    async with ended_badly(script) as (worker, saga):
        await worker.service.retry_compensation(saga.saga_id, {"a": {"input": CORRECTED, "reason": "typo"}})
        over = await worker.end_of(saga.saga_id)
        assert (over.undo_failed, over.compensation_failed, over.undo_corrections) == ((0,), True, {})
        assert (await logs(worker, saga))[-1] == (
            "a COMPENSATE FAILED x1",
            CORRECTED,
            "NOT_FOUND: still (request corrected: typo)",
        )
        await worker.service.retry_compensation(saga.saga_id)
        assert not (await worker.end_of(saga.saga_id)).compensation_failed
        assert [(seen.call.step_name, seen.call.request) for seen in worker.world.seen] == [
            ("c", {"order": 7}),
            ("b", {"order": 7}),
            ("a", CORRECTED),
            ("a", {"order": 7}),
        ]


async def test_everything_marked_done_ends_the_saga_at_once_and_calls_nobody(autojump_clock: MockClock) -> None:
    async with ended_badly(ALL_FAIL) as (worker, saga):
        over = await worker.service.retry_compensation(saga.saga_id, dict.fromkeys("abc", BY_HAND))
        assert (over.status, over.compensation_failed, over.undo_failed) == (S.FAILED, False, ())
        assert over.error_message == saga.error_message
        assert [line for line, _, _ in await logs(worker, saga)] == [
            "c COMPENSATE SUCCESS x0",
            "b COMPENSATE SUCCESS x0",
            "a COMPENSATE SUCCESS x0",
        ]
        await trio.sleep(10)
        assert worker.world.seen == []
        assert await worker.service.saga(saga.saga_id) == over
        with pytest.raises(Conflict):
            await worker.service.retry_compensation(saga.saga_id, {"a": BY_HAND})


async def test_a_cancel_meanwhile_only_names_the_end(autojump_clock: MockClock) -> None:
    script = {**ALL_FAIL, "undo b": [refuse("NOT_FOUND"), late(5.0)]}
    async with ended_badly(script) as (worker, saga):
        await worker.service.retry_compensation(saga.saga_id, {"a": {"input": CORRECTED}, "c": BY_HAND})
        await worker.world.until_called("undo b")
        await worker.service.cancel(saga.saga_id)
        over = await worker.end_of(saga.saga_id)
        assert (over.status, over.compensation_failed) == (S.CANCELLED, False)
        assert [(seen.call.step_name, seen.call.request) for seen in worker.world.seen] == [
            ("b", {"order": 7}),
            ("a", CORRECTED),
        ]


async def test_a_worker_that_dies_before_the_call_leaves_the_correction_to_the_next(autojump_clock: MockClock) -> None:
    world = World({**ALL_FAIL, "undo b": [refuse("NOT_FOUND"), late(1000.0), ok()]})
    async with memory_store(world, STEPS) as store:
        first = Worker(store.port, world, name="w1")
        async with first.at_work():
            saga_id = (await first.service.start(StartSaga(workflow_name="order"))).saga.saga_id
            await first.end_of(saga_id)
            await first.service.retry_compensation(saga_id, {"b": {"input": {"x": 1}}, "a": {"input": CORRECTED}})
            await world.until_called("undo b", 2)
        second = Worker(store.port, world, name="w2")
        async with second.at_work():
            assert not (await second.end_of(saga_id)).compensation_failed
        undone = [seen.call for seen in world.seen if seen.call.action is StepAction.COMPENSATE][3:]
        assert [(call.step_name, call.request, call.attempt) for call in undone] == [
            ("c", {}, 1),
            ("b", {"x": 1}, 1),
            ("b", {"x": 1}, 1),
            ("a", CORRECTED, 1),
        ]
        assert undone[2].epoch > undone[1].epoch


async def test_faults_are_told_and_nothing_is_changed(autojump_clock: MockClock) -> None:
    async with ended_badly(ALL_FAIL) as (worker, saga):
        with pytest.raises(Invalid) as caught:
            await worker.service.retry_compensation(saga.saga_id, {"a": BY_HAND, "d": BY_HAND, "z": {"input": 1}})
        assert [(detail.field, detail.reason) for detail in caught.value.details] == [
            ("steps.d", "not_failed"),
            ("steps.z", "unknown"),
            ("steps.z.input", "type"),
        ]
        assert await worker.service.saga(saga.saga_id) == saga


@pytest.mark.parametrize("loser", [{}, {"a": BY_HAND}])
async def test_of_two_operators_who_read_the_same_state_one_wins_and_the_other_is_told(
    loser: dict[str, Any], autojump_clock: MockClock
) -> None:
    """Both have read the ended saga before either writes; the loser's move looks just like the one that landed."""
    async with ended_badly(ALL_FAIL) as (worker, saga):
        assert isinstance(worker.store, InterposedStore)
        both_here, arrived = trio.Event(), 0

        async def wait_for_both(record: Record) -> None:
            nonlocal arrived
            arrived += record.before.status.is_terminal
            if arrived == 2:
                both_here.set()
            await both_here.wait()

        worker.store.before["record"] = wait_for_both
        answers: list[str] = []

        async def ask(steps: dict[str, Any]) -> None:
            try:
                await worker.service.retry_compensation(saga.saga_id, steps)
            except Conflict:
                answers.append("conflict")
            else:
                answers.append("accepted")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, {})
            nursery.start_soon(ask, loser)
        await worker.end_of(saga.saga_id)
        assert sorted(answers) == ["accepted", "conflict"]
        assert len(await logs(worker, saga)) == 3


async def test_a_retry_whose_answer_was_lost_is_unavailable_and_runs_once(autojump_clock: MockClock) -> None:
    async with ended_badly(ALL_FAIL) as (worker, saga):
        assert isinstance(worker.store, InterposedStore)
        store = worker.store

        async def lose(recorded: Recorded) -> None:
            store.after.clear()
            raise Unavailable("connection lost")

        store.after["record"] = lose
        with pytest.raises(Unavailable):
            await worker.service.retry_compensation(saga.saga_id, {"c": BY_HAND})
        with pytest.raises(Conflict):
            await worker.service.retry_compensation(saga.saga_id, {"c": BY_HAND})
        assert not (await worker.end_of(saga.saga_id)).compensation_failed
        assert [line for line, _, _ in await logs(worker, saga)] == [
            "c COMPENSATE SUCCESS x0",
            "b COMPENSATE SUCCESS x1",
            "a COMPENSATE SUCCESS x1",
        ]
