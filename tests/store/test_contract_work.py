"""The shared suite, second half: claims, releases, workers, cancel requests, lists, workflows. The same cases on every
store."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
import trio

from saga.model import Saga, SagaStatus, StepAction, StepStatus
from saga.ports import Claimed, Registered, SagaFilter, Store
from tests.store.samples import (
    WORKER,
    Database,
    StandingClock,
    created,
    definition,
    log_entry,
    move,
    running,
)


async def created_in_turn(store: Store, clock: StandingClock, number: int) -> list[Saga]:
    """Sagas one second apart, oldest first."""
    sagas = []
    for _ in range(number):
        sagas.append(await created(store))
        clock.advance(1)
    return sagas


async def parked(store: Store, status: SagaStatus, retry_in_secs: float) -> Saga:
    """A saga nobody owns that waits for its next attempt."""
    saga = await running(store)
    return (await store.record(move(saga, status=status, attempt=2, retry_in_secs=retry_in_secs, release=True))).saga


def ids(claimed: list[Claimed]) -> list[str]:
    return [one.saga.saga_id for one in claimed]


# --- claims -----------------------------------------------------------------------------------------------------------


async def test_claims_take_the_oldest_first_up_to_the_limit(store: Store, clock: StandingClock) -> None:
    sagas = await created_in_turn(store, clock, 5)
    assert ids(await store.claim_due_sagas(WORKER, 2)) == [saga.saga_id for saga in sagas[:2]]
    assert ids(await store.claim_due_sagas(WORKER, 10)) == [saga.saga_id for saga in sagas[2:]]
    assert await store.claim_due_sagas(WORKER, 10) == []


async def test_a_claim_makes_the_worker_owner_and_raises_the_epoch_alone(store: Store) -> None:
    saga = await created(store, payload={"a": "注"})
    (claimed,) = await store.claim_due_sagas(WORKER, 10)
    assert (claimed.saga.owner, claimed.saga.epoch, claimed.saga.revision) == (WORKER, 1, 0)
    assert claimed.saga == await store.get(saga.saga_id)
    assert (claimed.due_in_secs, claimed.deadline_in_secs, claimed.responses) == (0.0, None, {})
    assert await store.release(claimed.saga, interrupted=False)
    (again,) = await store.claim_due_sagas("worker-2", 10)
    assert again.saga.epoch == 2


@pytest.mark.parametrize("status", SagaStatus)
async def test_only_open_sagas_are_claimed(store: Store, status: SagaStatus) -> None:
    saga = await running(store)
    await store.record(move(saga, status=status, release=True))
    assert len(await store.claim_due_sagas(WORKER, 10)) == (0 if status.is_terminal else 1)


async def test_a_parked_saga_is_claimed_when_it_is_due_and_not_before(store: Store, clock: StandingClock) -> None:
    saga = await parked(store, SagaStatus.RUNNING, 40)
    clock.advance(39.9)
    assert await store.claim_due_sagas(WORKER, 10) == []
    clock.advance(0.2)
    (claimed,) = await store.claim_due_sagas(WORKER, 10)
    assert claimed.saga.saga_id == saga.saga_id
    assert claimed.saga.attempt == 2
    assert claimed.due_in_secs == 0.0


async def test_a_claim_tells_how_far_the_deadline_is(store: Store, clock: StandingClock) -> None:
    saga = await running(store)
    saga = (await store.record(move(saga, deadline_in_secs=60, release=True))).saga
    clock.advance(45)
    (claimed,) = await store.claim_due_sagas(WORKER, 10)
    assert claimed.deadline_in_secs == pytest.approx(15)
    await store.release(claimed.saga, interrupted=False)
    clock.advance(30)
    (claimed,) = await store.claim_due_sagas(WORKER, 10)
    assert claimed.deadline_in_secs == pytest.approx(-15)


async def test_a_claim_brings_the_responses_of_the_steps_that_succeeded_and_no_others(store: Store) -> None:
    saga = await running(store)
    logs = (
        log_entry(0, step_name="reserve", response_payload={"id": "r-1", "注": [1, None]}),
        log_entry(1, step_name="silent", response_payload=None),
        log_entry(2, step_name="pay", status=StepStatus.FAILED, response_payload={"id": "p-1"}),
        log_entry(0, step_name="undone", action=StepAction.COMPENSATE, response_payload={"id": "u-1"}),
    )
    await store.record(move(saga, current_step=2, logs=logs, release=True))
    (claimed,) = await store.claim_due_sagas(WORKER, 10)
    assert claimed.responses == {"reserve": {"id": "r-1", "注": [1, None]}, "silent": {}}


async def test_two_claimers_never_get_the_same_saga(store: Store, clock: StandingClock) -> None:
    sagas = await created_in_turn(store, clock, 30)
    taken: dict[str, list[str]] = {}

    async def claim(worker: str) -> None:
        taken[worker] = []
        while claimed := await store.claim_due_sagas(worker, 4):
            taken[worker] += ids(claimed)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(claim, "worker-1")
        nursery.start_soon(claim, "worker-2")
    everything = taken["worker-1"] + taken["worker-2"]
    assert sorted(everything) == sorted(saga.saga_id for saga in sagas)


# --- releases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted", [False, True])
async def test_a_release_frees_the_saga_and_tells_whether_the_outcome_is_unknown(
    store: Store, interrupted: bool
) -> None:
    saga = await running(store)
    assert await store.release(saga, interrupted=interrupted)
    now = await store.get(saga.saga_id)
    assert now is not None
    assert (now.owner, now.outcome_unknown, now.attempt, now.revision) == (None, interrupted, 1, saga.revision)


async def test_a_release_does_not_forget_an_unknown_outcome(store: Store) -> None:
    saga = await running(store)
    saga = (await store.record(move(saga, attempt=2, outcome_unknown=True))).saga
    assert await store.release(saga, interrupted=False)
    now = await store.get(saga.saga_id)
    assert now is not None
    assert now.outcome_unknown


async def test_a_release_needs_the_owner_and_the_epoch(store: Store) -> None:
    saga = await running(store)
    assert await store.release(saga, interrupted=False)
    assert not await store.release(saga, interrupted=True)
    (claimed,) = await store.claim_due_sagas(WORKER, 1)
    assert not await store.release(saga, interrupted=True)
    assert await store.get(saga.saga_id) == claimed.saga


async def test_a_released_saga_waits_as_long_as_it_was_told(store: Store, clock: StandingClock) -> None:
    saga = await running(store)
    assert await store.release(saga, interrupted=False, retry_in_secs=10)
    clock.advance(9)
    assert await store.claim_due_sagas(WORKER, 10) == []
    clock.advance(1)
    assert len(await store.claim_due_sagas(WORKER, 10)) == 1


async def test_a_release_without_a_pause_keeps_the_pause_there_was(store: Store, clock: StandingClock) -> None:
    saga = await running(store)
    saga = (await store.record(move(saga, attempt=2, retry_in_secs=20))).saga
    assert await store.release(saga, interrupted=False)
    assert await store.claim_due_sagas(WORKER, 10) == []
    clock.advance(20)
    assert len(await store.claim_due_sagas(WORKER, 10)) == 1


# --- cancel requests --------------------------------------------------------------------------------------------------


async def test_a_cancel_request_is_durable_and_leaves_the_fence_of_the_owner_alone(store: Store) -> None:
    saga = await running(store)
    marked = await store.request_cancel_unless_terminal(saga.saga_id)
    assert marked == await store.get(saga.saga_id)
    assert marked is not None
    assert marked.cancel_requested
    assert (marked.owner, marked.epoch, marked.revision) == (saga.owner, saga.epoch, saga.revision)
    assert await store.request_cancel_unless_terminal(saga.saga_id.upper()) is not None


async def test_a_cancel_request_makes_a_parked_saga_due_at_once(store: Store) -> None:
    saga = await parked(store, SagaStatus.RUNNING, 3600)
    marked = await store.request_cancel_unless_terminal(saga.saga_id)
    assert marked is not None
    assert marked.next_attempt_at is None
    (claimed,) = await store.claim_due_sagas(WORKER, 10)
    assert claimed.saga.cancel_requested


async def test_a_cancel_request_makes_a_saga_due_at_once_though_the_worker_that_waits_with_it_dies(
    store: Store, clock: StandingClock
) -> None:
    await store.register_worker(WORKER, 15)
    saga = await running(store)
    await store.record(move(saga, attempt=2, retry_in_secs=3600))
    assert await store.request_cancel_unless_terminal(saga.saga_id) is not None
    clock.advance(16)
    assert await store.release_expired_workers() == 1
    (claimed,) = await store.claim_due_sagas("worker-2", 10)
    assert claimed.saga.cancel_requested


async def test_a_pause_that_is_stored_after_a_cancel_request_does_not_put_it_off(store: Store) -> None:
    saga = await running(store)
    await store.request_cancel_unless_terminal(saga.saga_id)
    parked_saga = (await store.record(move(saga, attempt=2, retry_in_secs=3600, release=True))).saga
    assert parked_saga.next_attempt_at is None
    (claimed,) = await store.claim_due_sagas(WORKER, 10)
    assert claimed.saga.cancel_requested


async def test_a_compensation_keeps_its_pause_whenever_the_cancel_request_came(store: Store) -> None:
    saga = await running(store)
    await store.request_cancel_unless_terminal(saga.saga_id)
    waiting = move(saga, status=SagaStatus.COMPENSATING, undo_plan=(0,), retry_in_secs=60, release=True)
    assert (await store.record(waiting)).saga.next_attempt_at is not None
    assert await store.claim_due_sagas(WORKER, 10) == []


async def test_a_cancel_request_does_not_hurry_a_compensation_that_waits(store: Store, clock: StandingClock) -> None:
    saga = await parked(store, SagaStatus.COMPENSATING, 60)
    marked = await store.request_cancel_unless_terminal(saga.saga_id)
    assert marked is not None
    assert marked.cancel_requested
    assert await store.claim_due_sagas(WORKER, 10) == []
    clock.advance(60)
    assert len(await store.claim_due_sagas(WORKER, 10)) == 1


@pytest.mark.parametrize("status", [SagaStatus.COMPLETED, SagaStatus.FAILED, SagaStatus.CANCELLED])
async def test_a_final_saga_is_not_marked_by_a_cancel_request(store: Store, status: SagaStatus) -> None:
    saga = await running(store)
    final = (await store.record(move(saga, status=status))).saga
    assert await store.request_cancel_unless_terminal(saga.saga_id) == final
    assert not final.cancel_requested


# --- workers ----------------------------------------------------------------------------------------------------------


async def test_the_sagas_of_a_worker_whose_lease_ended_are_freed_and_running_ones_marked(
    store: Store, clock: StandingClock
) -> None:
    await store.register_worker(WORKER, 15)
    waiting = await created(store, owner=WORKER)
    active = await running(store)
    undoing = await running(store)
    undoing = (await store.record(move(undoing, status=SagaStatus.COMPENSATING, undo_plan=(0,)))).saga
    done = await running(store)
    done = (await store.record(move(done, status=SagaStatus.COMPLETED))).saga
    clock.advance(15.1)
    assert await store.release_expired_workers() == 3
    assert await store.release_expired_workers() == 0
    marks = {}
    for saga in (waiting, active, undoing):
        now = await store.get(saga.saga_id)
        assert now is not None
        assert now.owner is None
        assert now.revision == saga.revision
        marks[now.status] = now.outcome_unknown
    assert marks == {SagaStatus.STARTED: False, SagaStatus.RUNNING: True, SagaStatus.COMPENSATING: False}
    assert await store.get(done.saga_id) == done
    assert len(await store.claim_due_sagas("worker-2", 10)) == 3


async def test_a_worker_that_renews_keeps_its_sagas(store: Store, clock: StandingClock) -> None:
    await store.register_worker(WORKER, 15)
    saga = await running(store)
    for _ in range(3):
        clock.advance(14)
        assert await store.renew_lease(WORKER, 15)
        assert await store.release_expired_workers() == 0
    assert await store.get(saga.saga_id) == saga


async def test_a_lease_that_ended_cannot_be_renewed(store: Store, clock: StandingClock) -> None:
    await store.register_worker(WORKER, 15)
    clock.advance(15.1)
    assert not await store.renew_lease(WORKER, 15)
    assert not await store.renew_lease("never-registered", 15)
    await store.register_worker(WORKER, 15)
    assert await store.renew_lease(WORKER, 15)


async def test_a_worker_that_ends_in_order_frees_what_it_still_owns(store: Store) -> None:
    await store.register_worker(WORKER, 15)
    await store.register_worker("worker-2", 15)
    saga = await running(store)
    other = await running(store, owner="worker-2")
    await store.remove_worker(WORKER)
    now = await store.get(saga.saga_id)
    assert now is not None
    assert (now.owner, now.outcome_unknown) == (None, True)
    assert await store.get(other.saga_id) == other
    assert not await store.renew_lease(WORKER, 15)


async def test_a_worker_is_told_which_of_its_sagas_are_asked_to_be_cancelled(store: Store) -> None:
    await store.register_worker(WORKER, 15)
    await store.register_worker("worker-2", 15)
    asked, undoing, other = await running(store), await running(store), await running(store, owner="worker-2")
    await running(store)
    await store.record(move(undoing, status=SagaStatus.COMPENSATING, undo_plan=(0,)))
    assert list(await store.cancel_requests(WORKER)) == []
    for saga in (asked, undoing, other):
        await store.request_cancel_unless_terminal(saga.saga_id)
    assert list(await store.cancel_requests(WORKER)) == [asked.saga_id]


async def test_a_worker_is_told_what_it_owns(store: Store) -> None:
    assert list(await store.owned(WORKER)) == []
    mine = [await running(store), await running(store)]
    await running(store, owner="worker-2")
    await store.record(move(await running(store), status=SagaStatus.COMPLETED))
    await store.release(await running(store), interrupted=False)
    found = sorted(await store.owned(WORKER), key=lambda saga: saga.saga_id)
    assert found == sorted(mine, key=lambda saga: saga.saga_id)


async def test_a_saga_that_has_ended_is_not_released(store: Store) -> None:
    saga = await running(store)
    ended = (await store.record(move(saga, status=SagaStatus.COMPLETED))).saga
    assert not await store.release(saga, interrupted=True)
    assert await store.get(saga.saga_id) == ended


async def test_a_saga_whose_owner_is_no_worker_is_freed(store: Store) -> None:
    # The write of a worker that was removed a moment before: nobody's lease would ever end.
    await store.register_worker("worker-2", 15)
    await running(store, owner="ghost")
    assert await store.release_expired_workers() == 1


# --- lists ------------------------------------------------------------------------------------------------------------


async def listed(store: Store, where: SagaFilter) -> list[str]:
    page = await store.list_sagas(where, limit=100)
    assert page.total_count == len(page.sagas)
    assert page.next_cursor is None
    return [saga.saga_id for saga in page.sagas]


async def test_a_list_is_newest_first_and_walked_by_cursor_without_gap_or_repeat(
    store: Store, clock: StandingClock
) -> None:
    # Twos of one instant: the id decides between them.
    sagas = []
    for _ in range(4):
        sagas += [await created(store), await created(store)]
        clock.advance(1)
    newest_first = sorted(sagas, key=lambda saga: (saga.created_at, saga.saga_id), reverse=True)
    seen: list[Saga] = []
    after: tuple[datetime, str] | None = None
    while True:
        page = await store.list_sagas(SagaFilter(), limit=3, after=after)
        assert page.total_count == 8
        seen += page.sagas
        after = page.next_cursor
        if after is None:
            break
    assert seen == newest_first


async def test_a_list_is_paged_by_offset_and_the_last_page_has_no_cursor(store: Store, clock: StandingClock) -> None:
    sagas = (await created_in_turn(store, clock, 6))[::-1]
    first = await store.list_sagas(SagaFilter(), limit=4)
    assert list(first.sagas) == sagas[:4]
    assert first.next_cursor == (sagas[3].created_at, sagas[3].saga_id)
    second = await store.list_sagas(SagaFilter(), limit=4, offset=4)
    assert (list(second.sagas), second.total_count, second.next_cursor) == (sagas[4:], 6, None)
    exact = await store.list_sagas(SagaFilter(), limit=6)
    assert exact.next_cursor is None
    beyond = await store.list_sagas(SagaFilter(), limit=4, offset=40)
    assert (beyond.sagas, beyond.total_count, beyond.next_cursor) == ((), 6, None)


async def test_each_filter_lets_through_what_it_names(store: Store, clock: StandingClock) -> None:
    plain = await created(store)
    clock.advance(10)
    refund = await created(store, workflow_name="refund", correlation_id="c-1")
    clock.advance(10)
    failed = await running(store)
    failed = (await store.record(move(failed, status=SagaStatus.FAILED, compensation_failed=True))).saga
    everything = [failed.saga_id, refund.saga_id, plain.saga_id]
    assert await listed(store, SagaFilter()) == everything
    assert await listed(store, SagaFilter(workflow_name="refund")) == [refund.saga_id]
    assert await listed(store, SagaFilter(status=SagaStatus.FAILED)) == [failed.saga_id]
    assert await listed(store, SagaFilter(correlation_id="c-1")) == [refund.saga_id]
    assert await listed(store, SagaFilter(compensation_failed=True)) == [failed.saga_id]
    assert await listed(store, SagaFilter(compensation_failed=False)) == everything[1:]
    assert await listed(store, SagaFilter(created_after=refund.created_at)) == everything[:2]
    assert await listed(store, SagaFilter(created_before=refund.created_at)) == everything[2:]
    assert await listed(
        store, SagaFilter(created_after=plain.created_at + timedelta(microseconds=1), workflow_name="order")
    ) == [failed.saga_id]
    assert await listed(store, SagaFilter(workflow_name="' OR 1=1 --")) == []


async def test_open_sagas_are_counted_by_state(store: Store) -> None:
    assert await store.count_open() == {}
    await created(store)
    await created(store)
    await running(store)
    done = await running(store)
    await store.record(move(done, status=SagaStatus.COMPLETED))
    assert await store.count_open() == {SagaStatus.STARTED: 2, SagaStatus.RUNNING: 1}


async def test_a_store_that_works_answers_a_ping(store: Store) -> None:
    await store.ping()


# --- workflows --------------------------------------------------------------------------------------------------------


async def test_a_changed_definition_gets_a_new_version_and_the_same_one_none(store: Store) -> None:
    one, two = definition("reserve"), definition("reserve", "pay")
    assert await store.register_workflow(one, "name: order # first") == Registered(version=1, changed=True)
    assert await store.register_workflow(one, "name: order # again") == Registered(version=1, changed=False)
    assert await store.register_workflow(two, "name: order") == Registered(version=2, changed=True)
    assert await store.register_workflow(one, "name: order") == Registered(version=3, changed=True)
    newest = await store.workflow("order")
    assert newest is not None
    assert (newest.version, newest.definition) == (3, one)
    second = await store.workflow("order", 2)
    assert second is not None
    assert second.definition == two
    assert await store.workflow("order", 4) is None
    assert await store.workflow("nothing") is None


async def test_workflows_are_the_newest_of_each_by_name(store: Store) -> None:
    for name in ("refund", "Zebra", "order", "注文"):
        await store.register_workflow(definition("a", name=name), "")
    await store.register_workflow(definition("a", "b"), "")
    found = await store.workflows()
    assert [(one.definition.name, one.version) for one in found] == [
        ("Zebra", 1),
        ("order", 2),
        ("refund", 1),
        ("注文", 1),
    ]


async def test_a_workflow_registered_by_many_at_once_gets_one_version(store: Store) -> None:
    results: list[Registered] = []

    async def register() -> None:
        results.append(await store.register_workflow(definition("a"), ""))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(register)
    assert {result.version for result in results} == {1}
    assert sum(result.changed for result in results) == 1


async def test_what_was_stored_is_there_for_the_next_process(database: Database, clock: StandingClock) -> None:
    if database.kind in ("sqlite_memory", "simulated"):
        # They end with their process by their nature; the case is the other stores'.
        return
    async with database.opened(clock) as store:
        saga = await running(store)
        await store.register_workflow(definition("a"), "")
    async with database.opened(clock) as store:
        assert await store.get(saga.saga_id) == saga
        assert (await store.workflows())[0].version == 1
