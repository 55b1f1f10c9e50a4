"""The shared suite, first half: creations, moves, cancel requests. The same cases on every store."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import pytest
import trio

from saga.errors import Conflict, LeaseLost, RowRejected
from saga.model import EventType, Saga, SagaStatus, StepAction, StepStatus, UndoCorrection
from saga.ports import Created, Recorded, Store
from tests.store.samples import (
    WORKER,
    Database,
    StandingClock,
    created,
    event,
    log_entry,
    move,
    new_saga,
    running,
)

WIDE = {"name": "Zoë 注文 🚚", "quote": "\"'\\", "deep": [{"a": [1, 2.5, None, True]}], "big": 2**60, "empty": {}}


# --- creations --------------------------------------------------------------------------------------------------------


async def test_a_created_saga_reads_back_as_it_was_given(store: Store, clock: StandingClock) -> None:
    new = new_saga(
        payload=WIDE,
        correlation_id="c-1",
        initiated_by="web",
        traceparent="00-ab-cd-01",
        tracestate="a=1,b=2",
        workflow_version=3,
    )
    made = await store.create(new)
    assert not made.replayed
    assert made.saga == Saga(
        saga_id=new.saga_id,
        workflow_name="order",
        workflow_version=3,
        status=SagaStatus.STARTED,
        payload=WIDE,
        created_at=clock.instant,
        updated_at=made.saga.updated_at,
        correlation_id="c-1",
        initiated_by="web",
        traceparent="00-ab-cd-01",
        tracestate="a=1,b=2",
    )
    assert await store.get(new.saga_id) == made.saga
    assert await store.get(new.saga_id.upper()) == made.saga


async def test_a_saga_created_with_an_owner_has_changed_hands_once_and_cannot_be_claimed(store: Store) -> None:
    saga = await created(store, owner=WORKER)
    assert (saga.owner, saga.epoch) == (WORKER, 1)
    assert await store.claim_due_sagas("worker-2", 10) == []


SOME_UUID = "3d67649b-8708-4d52-83e5-ee01e7587687"


@pytest.mark.parametrize("saga_id", ["", "nonsense", f"{{{SOME_UUID}}}", SOME_UUID.replace("-", ""), "'; --"])
async def test_an_id_that_is_no_uuid_is_an_id_of_no_saga(store: Store, saga_id: str) -> None:
    assert await store.get(saga_id) is None
    assert await store.step_logs(saga_id) == []
    assert await store.request_cancel_unless_terminal(saga_id) is None
    with pytest.raises(RowRejected):
        await store.create(new_saga(saga_id=saga_id))


async def test_an_unknown_saga_is_none(store: Store) -> None:
    assert await store.get(str(uuid.uuid4())) is None
    assert await store.step_logs(str(uuid.uuid4())) == []
    assert await store.request_cancel_unless_terminal(str(uuid.uuid4())) is None


async def test_the_same_key_with_the_same_body_gives_the_first_saga_back(store: Store, database: Database) -> None:
    first = await store.create(new_saga(idempotency_key="k-1", request_digest="d"))
    again = await store.create(new_saga(idempotency_key="k-1", request_digest="d"))
    assert again == Created(saga=first.saga, replayed=True)
    assert len(database.ask(store, "SELECT id FROM saga.saga_states")) == 1
    assert len(database.ask(store, "SELECT id FROM saga.outbox")) == 1


async def test_the_same_key_with_another_body_is_a_conflict(store: Store) -> None:
    await store.create(new_saga(idempotency_key="k-1", request_digest="d"))
    with pytest.raises(Conflict, match="k-1"):
        await store.create(new_saga(idempotency_key="k-1", request_digest="other"))


async def test_two_simultaneous_creations_with_one_key_make_one_saga(store: Store, database: Database) -> None:
    results: list[Created] = []

    async def one() -> None:
        results.append(await store.create(new_saga(idempotency_key="k-1", request_digest="d")))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(one)
    assert sorted(result.replayed for result in results) == [False, True, True, True, True]
    assert len({result.saga.saga_id for result in results}) == 1
    assert len(database.ask(store, "SELECT id FROM saga.saga_states")) == 1


async def test_a_creation_sent_again_after_it_landed_lands_once(store: Store, database: Database) -> None:
    new = new_saga(idempotency_key="k-1", request_digest="d", owner=WORKER)
    first = await store.create(new)
    assert await store.create(new) == first
    assert database.outbox(store, new.saga_id) == [("SAGA_STARTED", "STARTED", 0, None)]


async def test_a_known_id_with_other_content_is_a_conflict(store: Store) -> None:
    saga = await created(store)
    with pytest.raises(Conflict):
        await store.create(new_saga(saga_id=saga.saga_id, payload={"order": 8}))
    assert await store.get(saga.saga_id) == saga


@pytest.mark.parametrize(
    "poison",
    [{"correlation_id": "x" * 256}, {"payload": {"half": "\ud800"}}, {"workflow_version": 2**40, "owner": "x" * 256}],
    ids=["too long", "half a surrogate pair", "out of range"],
)
async def test_a_creation_no_table_can_hold_is_refused_alone(store: Store, poison: dict[str, Any]) -> None:
    refused: list[RowRejected] = []
    good: list[Saga] = []

    async def bad() -> None:
        try:
            await store.create(new_saga(**poison))
        except RowRejected as error:
            refused.append(error)

    async def fine() -> None:
        good.append(await created(store))

    async with trio.open_nursery() as nursery:
        for task in (fine, fine, bad, fine):
            nursery.start_soon(task)
    assert len(refused) == 1
    assert len(good) == 3
    for saga in good:
        assert await store.get(saga.saga_id) == saga


# --- moves ------------------------------------------------------------------------------------------------------------


async def test_a_move_is_stored_whole_and_read_back_equal(store: Store, clock: StandingClock) -> None:
    saga = await created(store, owner=WORKER)
    clock.advance(1)
    recorded = await store.record(
        move(
            saga,
            status=SagaStatus.COMPENSATING,
            current_step=2,
            error_message="step 'pay' failed: 注文 refused",
            compensation_failed=True,
            attempt=2,
            outcome_unknown=True,
            undo_plan=(1, 0),
            undo_failed=(2,),
            undo_corrections={1: UndoCorrection(request={"a": [1, None]}), 0: UndoCorrection(reason="手で返金")},
            logs=(log_entry(),),
            retry_in_secs=2.5,
            deadline_in_secs=60,
        )
    )
    stored = recorded.saga
    assert recorded.landed
    assert await store.get(saga.saga_id) == stored
    assert stored == msgspec.structs.replace(
        saga,
        status=SagaStatus.COMPENSATING,
        current_step=2,
        error_message="step 'pay' failed: 注文 refused",
        compensation_failed=True,
        attempt=2,
        outcome_unknown=True,
        undo_plan=(1, 0),
        undo_failed=(2,),
        undo_corrections={1: UndoCorrection(request={"a": [1, None]}), 0: UndoCorrection(reason="手で返金")},
        revision=1,
        next_attempt_at=stored.next_attempt_at,
        deadline_at=stored.deadline_at,
        updated_at=stored.updated_at,
    )
    assert stored.next_attempt_at is not None
    assert stored.deadline_at is not None
    assert (stored.next_attempt_at - clock.instant).total_seconds() == 2.5
    assert (stored.deadline_at - clock.instant).total_seconds() == 60


async def test_the_next_attempt_is_forgotten_and_the_deadline_kept_unless_the_move_says_otherwise(store: Store) -> None:
    saga = await running(store)
    first = (await store.record(move(saga, attempt=2, retry_in_secs=5, deadline_in_secs=60))).saga
    second = (await store.record(move(first, current_step=1))).saga
    assert second.next_attempt_at is None
    assert second.deadline_at == first.deadline_at
    assert second.revision == 3


async def test_a_move_rewrites_neither_payload_nor_birth(store: Store) -> None:
    saga = await running(store)
    recorded = await store.record(move(saga, payload={"other": 1}, cancel_requested=True, current_step=1))
    assert recorded.saga.payload == {"order": 7}
    assert recorded.saga.cancel_requested is False
    assert await store.get(saga.saga_id) == recorded.saga


async def test_a_move_can_give_the_saga_up(store: Store) -> None:
    saga = await running(store)
    recorded = await store.record(move(saga, attempt=2, retry_in_secs=40, release=True))
    assert recorded.saga.owner is None
    assert recorded.saga.epoch == saga.epoch
    assert await store.get(saga.saga_id) == recorded.saga


@pytest.mark.parametrize(
    "stale", [{"owner": "worker-2"}, {"owner": None}, {"epoch": 2}, {"epoch": 0}, {"revision": 0}, {"revision": 7}]
)
async def test_a_write_that_relied_on_another_owner_epoch_or_revision_changes_nothing(
    store: Store, database: Database, stale: dict[str, Any]
) -> None:
    saga = await running(store)
    believed = msgspec.structs.replace(saga, **stale)
    events = (event(EventType.SAGA_FAILED, SagaStatus.FAILED),)
    with pytest.raises(LeaseLost, match=saga.saga_id):
        await store.record(move(believed, status=SagaStatus.FAILED, logs=(log_entry(),), events=events))
    assert await store.get(saga.saga_id) == saga
    assert await store.step_logs(saga.saga_id) == []
    assert len(database.outbox(store, saga.saga_id)) == 1


async def test_a_move_of_a_saga_that_is_gone_lost_its_lease(store: Store, database: Database) -> None:
    saga = await running(store)
    database.ask(store, "DELETE FROM saga.saga_states")
    with pytest.raises(LeaseLost):
        await store.record(move(saga, current_step=1))


@pytest.mark.parametrize("status", [SagaStatus.COMPLETED, SagaStatus.FAILED])
async def test_a_cancel_request_that_came_first_bars_any_other_end_and_the_saga_is_told_so(
    store: Store, database: Database, status: SagaStatus
) -> None:
    saga = await running(store)
    await store.request_cancel_unless_terminal(saga.saga_id)
    events = (event(EventType.SAGA_COMPLETED, status),)
    recorded = await store.record(move(saga, status=status, logs=(log_entry(),), events=events))
    now = await store.get(saga.saga_id)
    assert recorded == Recorded(saga=now or saga, landed=False)
    assert recorded.saga.status is SagaStatus.RUNNING
    assert recorded.saga.cancel_requested
    assert await store.step_logs(saga.saga_id) == []
    assert len(database.outbox(store, saga.saga_id)) == 1


async def test_a_cancel_request_that_comes_after_completion_changes_nothing(store: Store) -> None:
    saga = await running(store)
    completed = (await store.record(move(saga, status=SagaStatus.COMPLETED))).saga
    assert await store.request_cancel_unless_terminal(saga.saga_id) == completed
    assert not completed.cancel_requested


async def test_completion_and_cancel_request_at_once_have_one_winner_and_both_are_told_the_same(store: Store) -> None:
    saga = await running(store)
    recorded: list[Recorded] = []
    answers: list[Saga | None] = []

    async def complete() -> None:
        recorded.append(await store.record(move(saga, status=SagaStatus.COMPLETED)))

    async def cancel() -> None:
        answers.append(await store.request_cancel_unless_terminal(saga.saga_id))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(complete)
        nursery.start_soon(cancel)
    answer = answers[0]
    assert answer is not None
    assert recorded[0].landed == (answer.status is SagaStatus.COMPLETED)
    assert answer.cancel_requested == (not recorded[0].landed)


async def test_a_cancel_request_bars_failed_too_so_that_it_names_the_end(store: Store) -> None:
    saga = await running(store)
    await store.request_cancel_unless_terminal(saga.saga_id)
    refused = await store.record(move(saga, status=SagaStatus.FAILED))
    assert not refused.landed
    assert (refused.saga.status, refused.saga.cancel_requested) == (SagaStatus.RUNNING, True)
    ended = await store.record(move(refused.saga, status=SagaStatus.CANCELLED))
    assert (ended.landed, ended.saga.status) == (True, SagaStatus.CANCELLED)


async def test_a_cancel_request_bars_no_other_move_and_no_move_clears_it(store: Store) -> None:
    saga = await running(store)
    await store.request_cancel_unless_terminal(saga.saga_id)
    recorded = await store.record(move(saga, status=SagaStatus.COMPENSATING, undo_plan=(0,)))
    assert recorded.landed
    assert recorded.saga.cancel_requested
    assert await store.get(saga.saga_id) == recorded.saga


@pytest.mark.parametrize("release", [False, True])
async def test_a_move_sent_again_after_it_landed_lands_once(store: Store, database: Database, release: bool) -> None:
    saga = await running(store)
    events = (event(EventType.SAGA_COMPENSATING, SagaStatus.COMPENSATING),)
    record = move(
        saga,
        status=SagaStatus.COMPENSATING,
        undo_plan=(0,),
        logs=(log_entry(),),
        events=events,
        retry_in_secs=9,
        release=release,
    )
    first = await store.record(record)
    assert await store.record(record) == first
    assert len(await store.step_logs(saga.saga_id)) == 1
    assert len(database.outbox(store, saga.saga_id)) == 2


async def test_a_move_sent_again_after_the_saga_went_to_another_worker_is_a_lost_lease(store: Store) -> None:
    saga = await running(store)
    record = move(saga, attempt=2, release=True)
    await store.record(record)
    (claimed,) = await store.claim_due_sagas("worker-2", 1)
    with pytest.raises(LeaseLost):
        await store.record(record)
    assert await store.get(saga.saga_id) == claimed.saga


async def test_another_move_from_the_same_point_is_a_lost_race_and_not_a_repeat(store: Store) -> None:
    saga = await running(store)
    await store.record(move(saga, status=SagaStatus.COMPLETED))
    with pytest.raises(LeaseLost):
        await store.record(move(saga, status=SagaStatus.COMPENSATING, undo_plan=(0,)))


async def test_a_release_by_others_does_not_pass_for_a_move_that_landed(store: Store) -> None:
    saga = await running(store)
    assert await store.release(saga, interrupted=True)
    with pytest.raises(LeaseLost):
        await store.record(move(saga, attempt=2, release=True))


@pytest.mark.parametrize("status", [SagaStatus.COMPENSATING, SagaStatus.FAILED])
async def test_of_two_who_reopen_a_final_saga_alike_one_wins(store: Store, status: SagaStatus) -> None:
    """Nobody runs it, so equal moves are of two operators and not one move sent twice."""
    saga = await running(store)
    over = (await store.record(move(saga, status=SagaStatus.FAILED, undo_failed=(0,), release=True))).saga
    again = move(over, status=status, undo_plan=(0,), undo_failed=(), attempt=1, release=True)
    first = await store.record(again)
    with pytest.raises(LeaseLost):
        await store.record(again)
    assert await store.get(saga.saga_id) == first.saga


async def test_a_final_saga_nobody_owns_can_be_reopened_by_a_move_that_names_its_revision(store: Store) -> None:
    saga = await running(store)
    failed = (
        await store.record(
            move(saga, status=SagaStatus.FAILED, compensation_failed=True, undo_failed=(0,), release=True)
        )
    ).saga
    assert await store.claim_due_sagas("worker-2", 10) == []
    reopened = move(
        failed, status=SagaStatus.COMPENSATING, compensation_failed=False, undo_plan=(0,), undo_failed=(), attempt=1
    )
    await store.record(reopened)
    (claimed,) = await store.claim_due_sagas("worker-2", 10)
    assert claimed.saga.saga_id == saga.saga_id
    assert claimed.saga.undo_plan == (0,)


@pytest.mark.parametrize(
    "poison",
    [
        {"logs": (log_entry(step_name="x" * 256),)},
        {"logs": (log_entry(response_payload={"half": "\ud800"}),)},
        {"current_step": 2**40},
        {"error_message": "half a pair \ud800"},
        {"current_step": -1},
    ],
    ids=["too long", "no JSON", "out of range", "no text", "against a check"],
)
async def test_a_poisoned_row_fails_alone_in_a_batch_of_good_ones(store: Store, poison: dict[str, Any]) -> None:
    sagas = [await running(store) for _ in range(5)]
    refused: list[RowRejected] = []

    async def bad(saga: Saga) -> None:
        try:
            await store.record(move(saga, **poison))
        except RowRejected as error:
            refused.append(error)

    async def fine(saga: Saga) -> None:
        await store.record(move(saga, current_step=1, logs=(log_entry(),)))

    async with trio.open_nursery() as nursery:
        for place, saga in enumerate(sagas):
            nursery.start_soon(bad if place == 2 else fine, saga)
    assert len(refused) == 1
    for place, saga in enumerate(sagas):
        now = await store.get(saga.saga_id)
        assert now is not None
        assert now.current_step == (0 if place == 2 else 1)
        assert len(await store.step_logs(saga.saga_id)) == (0 if place == 2 else 1)


async def test_many_sagas_moving_at_once_all_land(store: Store) -> None:
    async def live(results: list[Saga]) -> None:
        saga = await running(store)
        for step in range(3):
            saga = (await store.record(move(saga, current_step=step + 1, logs=(log_entry(step),)))).saga
        results.append((await store.record(move(saga, status=SagaStatus.COMPLETED, attempt=0, release=True))).saga)

    results: list[Saga] = []
    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(live, results)
    assert len(results) == 40
    for saga in results:
        assert await store.get(saga.saga_id) == saga
        assert [log.step_index for log in await store.step_logs(saga.saga_id)] == [0, 1, 2]


async def test_a_caller_cancelled_beforehand_writes_nothing(store: Store) -> None:
    saga = await running(store)
    with trio.CancelScope() as scope:
        scope.cancel()
        await store.record(move(saga, current_step=1))
    assert scope.cancelled_caught
    assert await store.get(saga.saga_id) == saga


# --- step logs, events, deletion --------------------------------------------------------------------------------------


async def test_step_logs_keep_the_order_of_writing_and_all_their_fields(store: Store) -> None:
    saga = await running(store)
    undo = log_entry(
        0,
        action=StepAction.COMPENSATE,
        status=StepStatus.TIMEOUT,
        attempts=5,
        request_payload=WIDE,
        error_message="no answer",
    )
    entries = (log_entry(1, response_payload=WIDE), log_entry(0, request_payload={}), undo)
    saga = (await store.record(move(saga, logs=entries[:2]))).saga
    await store.record(move(saga, logs=entries[2:]))
    logs = await store.step_logs(saga.saga_id)
    assert len({log.id for log in logs}) == 3
    for log, entry in zip(logs, entries, strict=True):
        assert log.saga_id == saga.saga_id
        assert str(uuid.UUID(log.id)) == log.id
        for field in entry.__struct_fields__:
            assert getattr(log, field) == getattr(entry, field), field


async def test_events_are_written_with_the_move_they_tell_of_in_order(store: Store, database: Database) -> None:
    saga = await created(store, owner=WORKER)
    first = (event(EventType.SAGA_RUNNING, SagaStatus.RUNNING), event(EventType.SAGA_COMPENSATING, SagaStatus.RUNNING))
    saga = (await store.record(move(saga, status=SagaStatus.RUNNING, events=first))).saga
    await store.record(
        move(saga, status=SagaStatus.FAILED, events=(event(EventType.SAGA_FAILED, SagaStatus.FAILED, 2, "card"),))
    )
    assert database.outbox(store, saga.saga_id) == [
        ("SAGA_STARTED", "STARTED", 0, None),
        ("SAGA_RUNNING", "RUNNING", 0, None),
        ("SAGA_COMPENSATING", "RUNNING", 0, None),
        ("SAGA_FAILED", "FAILED", 2, "card"),
    ]
    unpublished = database.ask(store, "SELECT count(*) FROM saga.outbox WHERE published_at IS NULL")
    assert unpublished == [(4,)]


async def test_without_events_the_outbox_stays_empty(database: Database, clock: StandingClock) -> None:
    async with database.opened(clock, events=False) as store:
        saga = await running(store)
        events = (event(EventType.SAGA_COMPLETED, SagaStatus.COMPLETED),)
        await store.record(move(saga, status=SagaStatus.COMPLETED, events=events))
        assert database.outbox(store, saga.saga_id) == []


async def test_a_deleted_saga_takes_its_logs_and_events_with_it(store: Store, database: Database) -> None:
    saga = await running(store)
    await store.record(move(saga, logs=(log_entry(),)))
    database.ask(store, "DELETE FROM saga.saga_states WHERE id = $1", saga.saga_id)
    assert database.ask(store, "SELECT count(*) FROM saga.saga_step_logs") == [(0,)]
    assert database.ask(store, "SELECT count(*) FROM saga.outbox") == [(0,)]
