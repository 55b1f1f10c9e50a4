"""What every store promises about the undo debt: effects that should be undone and are not. See `conftest.py`."""

from __future__ import annotations

from datetime import timedelta

from saga.model import Saga, SagaStatus
from saga.ports import SchemaState, Store, UndoDebt
from saga.workflow import Step, WorkflowDefinition
from tests.store.samples import Database, StandingClock, created, move, running

COMPENSATING, FAILED, CANCELLED = SagaStatus.COMPENSATING, SagaStatus.FAILED, SagaStatus.CANCELLED


async def registered(store: Store) -> None:
    """Workflow `order`: its second step has no undo."""
    steps = tuple(
        Step(name=name, service="shop", method="Shop.Do", compensate=undo)
        for name, undo in (("reserve", "Shop.Undo"), ("note", None), ("charge", "Shop.Undo"), ("ship", "Shop.Undo"))
    )
    await store.register_workflow(WorkflowDefinition(name="order", steps=steps), "")


async def compensating(store: Store, *plan: int, **new: str) -> Saga:
    saga = await running(store, **new)
    change = move(saga, status=COMPENSATING, current_step=3, undo_plan=plan, attempt=1)
    return (await store.record(change)).saga


def owed(failed: int, pending: int, oldest_secs: float, name: str = "order") -> UndoDebt:
    return UndoDebt(workflow_name=name, failed=failed, pending=pending, oldest_secs=oldest_secs)


async def test_sagas_that_owe_no_undo_are_no_debt(store: Store) -> None:
    await registered(store)
    await created(store)
    done = await running(store)
    await store.record(move(done, status=SagaStatus.COMPLETED, current_step=3))
    refused = await running(store)
    await store.record(move(refused, status=FAILED))
    assert await store.undo_debt() == []


async def test_the_debt_of_a_saga_is_what_it_still_has_to_undo_save_steps_that_have_no_undo(
    store: Store, clock: StandingClock
) -> None:
    await registered(store)
    saga = await compensating(store, 2, 1, 0)
    assert await store.undo_debt() == [owed(0, 2, 0.0)]
    clock.advance(60)
    saga = (await store.record(move(saga, undo_plan=(0,)))).saga
    assert await store.undo_debt() == [owed(0, 1, 60.0)]
    clock.advance(60)
    await store.record(move(saga, status=FAILED, undo_plan=(), attempt=0))
    assert await store.undo_debt() == []


async def test_a_failed_undo_is_owed_until_it_is_run_again_with_success_and_as_old_as_when_it_began(
    store: Store, clock: StandingClock
) -> None:
    await registered(store)
    saga = await compensating(store, 2, 1, 0)
    clock.advance(10)
    saga = (await store.record(move(saga, undo_plan=(0,), undo_failed=(2,), compensation_failed=True))).saga
    assert await store.undo_debt() == [owed(1, 1, 10.0)]
    clock.advance(10)
    saga = (await store.record(move(saga, status=CANCELLED, undo_plan=(), attempt=0, release=True))).saga
    assert await store.undo_debt() == [owed(1, 0, 20.0)]
    clock.advance(3600)
    saga = (await store.record(move(saga, status=COMPENSATING, undo_plan=(2,), undo_failed=(), attempt=1))).saga
    assert await store.undo_debt() == [owed(0, 1, 3620.0)]
    await store.record(move(saga, status=CANCELLED, undo_plan=(), attempt=0, compensation_failed=False))
    assert await store.undo_debt() == []


async def test_debt_is_told_by_workflow_with_the_oldest_of_each(store: Store, clock: StandingClock) -> None:
    await registered(store)
    await compensating(store, 0)
    clock.advance(5)
    await compensating(store, 2, 0)
    # Its definition is nowhere: what is not known to have no undo is owed.
    await compensating(store, 0, workflow_name="refund")
    clock.advance(5)
    assert await store.undo_debt() == [owed(0, 3, 10.0), owed(0, 1, 5.0, "refund")]


async def test_the_age_of_a_debt_is_never_negative(store: Store, clock: StandingClock) -> None:
    await compensating(store, 0)
    clock.instant -= timedelta(seconds=5)
    assert await store.undo_debt() == [owed(0, 1, 0.0)]


async def test_the_debt_of_a_saga_that_is_removed_goes_with_it(
    store: Store, database: Database, clock: StandingClock
) -> None:
    saga = await compensating(store, 0)
    ended = move(saga, status=FAILED, undo_plan=(), undo_failed=(0,), compensation_failed=True, attempt=0, release=True)
    await store.record(ended)
    database.publish(store, saga.saga_id)
    clock.advance(100)
    assert await store.remove_ended_before(50, 10) == 1
    assert await store.undo_debt() == []


async def test_a_store_tells_that_its_tables_are_those_of_this_release(store: Store) -> None:
    assert await store.schema_state() is SchemaState.CURRENT


async def test_a_store_tells_when_its_tables_become_those_of_another_release(store: Store, database: Database) -> None:
    if database.kind == "simulated":
        return  # it has no tables
    newest = "(SELECT max(version) FROM saga.schema_migrations)"
    database.ask(
        store,
        "INSERT INTO saga.schema_migrations (version, name, checksum, applied_at)"
        f" SELECT 1 + version, 'later', 'x', applied_at FROM saga.schema_migrations WHERE version = {newest}",
    )
    assert await store.schema_state() is SchemaState.NEWER
    database.ask(store, f"DELETE FROM saga.schema_migrations WHERE version = {newest}")
    assert await store.schema_state() is SchemaState.CURRENT
    database.ask(store, f"DELETE FROM saga.schema_migrations WHERE version = {newest}")
    assert await store.schema_state() is SchemaState.OLDER
    database.ask(store, "UPDATE saga.schema_migrations SET checksum = 'x' WHERE version = 1")
    assert await store.schema_state() is SchemaState.CHANGED
