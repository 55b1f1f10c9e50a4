"""What every store promises about the removal of sagas that ended long ago. See `conftest.py` for the stores."""

from __future__ import annotations

from typing import Any

import pytest

from saga.errors import LeaseLost
from saga.model import Saga, SagaStatus
from saga.ports import Store
from tests.store.samples import Database, StandingClock, created, log_entry, move, new_saga, running

DAY = 86_400.0
FINAL = [SagaStatus.COMPLETED, SagaStatus.FAILED, SagaStatus.CANCELLED]


async def ended(
    store: Store, database: Database, status: SagaStatus = SagaStatus.COMPLETED, *, published: bool = True, **new: Any
) -> Saga:
    """A saga with a log that ends now."""
    saga = await running(store, **new)
    saga = (await store.record(move(saga, status=status, logs=(log_entry(),), release=True))).saga
    if published:
        database.publish(store, saga.saga_id)
    return saga


@pytest.mark.parametrize("status", FINAL)
async def test_a_saga_that_ended_long_ago_is_removed_with_its_logs_and_published_events(
    store: Store, database: Database, clock: StandingClock, status: SagaStatus
) -> None:
    old = await ended(store, database, status)
    clock.advance(DAY)
    assert await store.remove_ended_before(DAY, 10) == 0
    clock.advance(0.001)
    young = await ended(store, database, status)
    assert await store.remove_ended_before(DAY, 10) == 1
    assert await store.get(old.saga_id) is None
    assert await store.step_logs(old.saga_id) == []
    assert database.outbox(store, old.saga_id) == []
    assert await store.get(young.saga_id) == young
    assert len(await store.step_logs(young.saga_id)) == 1
    assert await store.remove_ended_before(DAY, 10) == 0


async def test_a_saga_that_is_not_over_stays_however_old_it_is(
    store: Store, database: Database, clock: StandingClock
) -> None:
    waiting, at_work = await created(store), await running(store)
    undoing = await running(store)
    undoing = (await store.record(move(undoing, status=SagaStatus.COMPENSATING, undo_plan=(0,), attempt=1))).saga
    for saga in (waiting, at_work, undoing):
        database.publish(store, saga.saga_id)
    clock.advance(1000 * DAY)
    assert await store.remove_ended_before(DAY, 10) == 0
    # It is the end that counts, not the beginning.
    await store.record(move(at_work, status=SagaStatus.COMPLETED))
    clock.advance(DAY)
    assert await store.remove_ended_before(DAY, 10) == 0
    clock.advance(1)
    assert await store.remove_ended_before(DAY, 10) == 1


async def test_an_event_that_is_still_to_be_published_keeps_its_saga_and_no_other(
    store: Store, database: Database, clock: StandingClock
) -> None:
    untold = await ended(store, database, published=False)
    clock.advance(1)
    await ended(store, database)
    clock.advance(2 * DAY)
    assert await store.remove_ended_before(DAY, 1) == 1
    assert await store.remove_ended_before(DAY, 1) == 0
    assert await store.get(untold.saga_id) == untold
    assert len(database.outbox(store, untold.saga_id)) == 1
    database.publish(store, untold.saga_id)
    assert await store.remove_ended_before(DAY, 1) == 1
    assert await store.get(untold.saga_id) is None


async def test_a_batch_takes_those_that_ended_longest_ago(
    store: Store, database: Database, clock: StandingClock
) -> None:
    sagas = []
    for _ in range(5):
        sagas.append(await ended(store, database))
        clock.advance(60)
    clock.advance(2 * DAY)
    assert await store.remove_ended_before(DAY, 2) == 2
    assert [await store.get(saga.saga_id) is None for saga in sagas] == [True, True, False, False, False]
    assert await store.remove_ended_before(DAY, 2) == 2
    assert await store.remove_ended_before(DAY, 2) == 1
    assert await store.remove_ended_before(DAY, 2) == 0


async def test_a_saga_that_is_reopened_is_not_over_and_ends_anew(
    store: Store, database: Database, clock: StandingClock
) -> None:
    saga = await running(store)
    failed = move(saga, status=SagaStatus.FAILED, compensation_failed=True, undo_failed=(0,), release=True)
    saga = (await store.record(failed)).saga
    database.publish(store, saga.saga_id)
    clock.advance(2 * DAY)
    again = move(saga, status=SagaStatus.COMPENSATING, undo_plan=(0,), undo_failed=(), attempt=1, release=True)
    await store.record(again)
    assert await store.remove_ended_before(DAY, 10) == 0
    (claimed,) = await store.claim_due_sagas("worker-2", 10)
    await store.record(move(claimed.saga, status=SagaStatus.FAILED, undo_plan=(), attempt=0))
    assert await store.remove_ended_before(DAY, 10) == 0
    clock.advance(DAY + 1)
    assert await store.remove_ended_before(DAY, 10) == 1


async def test_an_idempotency_key_goes_with_its_saga(store: Store, database: Database, clock: StandingClock) -> None:
    old = await ended(store, database, idempotency_key="k", request_digest="one")
    clock.advance(2 * DAY)
    assert await store.remove_ended_before(DAY, 10) == 1
    answer = await store.create(new_saga(idempotency_key="k", request_digest="another"))
    assert (answer.replayed, answer.saga.saga_id == old.saga_id) == (False, False)


async def test_a_saga_that_was_removed_cannot_be_reopened(
    store: Store, database: Database, clock: StandingClock
) -> None:
    saga = await running(store)
    saga = (await store.record(move(saga, status=SagaStatus.FAILED, undo_failed=(0,), release=True))).saga
    database.publish(store, saga.saga_id)
    clock.advance(2 * DAY)
    assert await store.remove_ended_before(DAY, 10) == 1
    with pytest.raises(LeaseLost):
        await store.record(move(saga, status=SagaStatus.COMPENSATING, undo_plan=(0,), undo_failed=(), attempt=1))


async def test_without_events_nothing_is_waited_for(database: Database, clock: StandingClock) -> None:
    async with database.opened(clock, events=False) as store:
        await ended(store, database, published=False)
        clock.advance(2 * DAY)
        assert await store.remove_ended_before(DAY, 10) == 1
