"""What every store promises of the audit log. See `conftest.py` for the stores."""

from __future__ import annotations

import sqlite3
from datetime import timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from saga.audit import AuditAction, AuditEntry, AuditFilter, AuditOutcome, Door, NewAuditEntry, Requester
from saga.errors import Conflict, LeaseLost, RowRejected
from saga.model import SagaStatus
from saga.ports import Store
from tests.store.samples import Database, StandingClock, created, definition, move, new_saga, running

ALICE = Requester(
    principal="alice", door=Door.REST, roles=("sys_auditor", "sys_operator"), address="10.0.0.7", request_id="r-1"
)
BOB = Requester(principal="bob", door=Door.GRPC)
EVERYTHING = AuditFilter()

with_sql = pytest.mark.parametrize("database", ["postgres", "sqlite_file", "sqlite_memory"], indirect=True)
"""Not the simulated tables, which have neither checks nor statements past the port."""


async def log_of(store: Store, where: AuditFilter = EVERYTHING, limit: int = 100) -> list[AuditEntry]:
    return list((await store.list_audit(where, limit=limit)).entries)


async def entered(store: Store, where: AuditFilter = EVERYTHING) -> list[NewAuditEntry]:
    """Newest first."""
    return [entry.entered for entry in await log_of(store, where)]


def retry(**changes: Any) -> NewAuditEntry:
    fields: dict[str, Any] = {"action": AuditAction.RETRY_COMPENSATION, "asked_by": ALICE}
    return NewAuditEntry(**(fields | changes))


def denied(asked_by: Requester = BOB, **changes: Any) -> NewAuditEntry:
    fields: dict[str, Any] = {"action": AuditAction.CANCEL_SAGA, "outcome": AuditOutcome.DENIED} | changes
    return NewAuditEntry(asked_by=asked_by, **fields)


# --- each change with its entry ---------------------------------------------------------------------------------------


async def test_a_creation_is_entered_with_who_asked_for_it(store: Store, clock: StandingClock) -> None:
    saga = await created(store, asked_by=ALICE)
    (entry,) = await log_of(store)
    assert entry.created_at == clock.instant == saga.created_at
    assert entry.entered == NewAuditEntry(
        action=AuditAction.START_SAGA,
        asked_by=ALICE,
        saga_id=saga.saga_id,
        workflow_name="order",
        workflow_version=1,
        after={"status": "STARTED", "revision": 0},
    )


async def test_a_creation_that_makes_nothing_enters_nothing(store: Store) -> None:
    first = new_saga(idempotency_key="k", request_digest="one", asked_by=ALICE)
    await store.create(first)
    await store.create(first)
    assert (await store.create(new_saga(idempotency_key="k", request_digest="one", asked_by=BOB))).replayed
    with pytest.raises(Conflict):
        await store.create(new_saga(idempotency_key="k", request_digest="two", asked_by=BOB))
    assert [(entry.saga_id, entry.asked_by) for entry in await entered(store)] == [(first.saga_id, ALICE)]


async def test_a_cancel_request_is_entered_each_time_and_with_the_state_it_met(store: Store) -> None:
    saga = await running(store)
    await store.request_cancel_unless_terminal(saga.saga_id.upper(), ALICE, "the customer called")
    await store.request_cancel_unless_terminal(saga.saga_id, BOB)
    latest, first, _ = await entered(store)
    assert (latest.asked_by, latest.reason, first.asked_by) == (BOB, None, ALICE)
    assert first == NewAuditEntry(
        action=AuditAction.CANCEL_SAGA,
        asked_by=ALICE,
        saga_id=saga.saga_id,
        workflow_name="order",
        workflow_version=1,
        reason="the customer called",
        before={"status": "RUNNING", "revision": 1},
        after={"status": "RUNNING", "revision": 1, "cancel_requested": True},
    )


async def test_a_cancel_request_that_comes_too_late_enters_nothing(store: Store) -> None:
    saga = await running(store)
    await store.record(move(saga, status=SagaStatus.COMPLETED))
    await store.request_cancel_unless_terminal(saga.saga_id, ALICE)
    await store.request_cancel_unless_terminal("no saga", ALICE)
    assert [entry.action for entry in await entered(store)] == [AuditAction.START_SAGA]


async def test_a_definition_is_entered_when_it_makes_a_version(store: Store) -> None:
    await store.register_workflow(definition("a"), "1", ALICE)
    await store.register_workflow(definition("a"), "again", BOB)
    await store.register_workflow(definition("a", "b"), "2", BOB)
    second, first = await entered(store)
    assert second == NewAuditEntry(
        action=AuditAction.REGISTER_WORKFLOW,
        asked_by=BOB,
        workflow_name="order",
        workflow_version=2,
        before={"version": 1},
        after={"version": 2},
    )
    assert (first.asked_by, first.before, first.after) == (ALICE, None, {"version": 1})


async def test_a_move_that_was_asked_for_is_entered_with_it_and_not_without(store: Store) -> None:
    saga = await running(store)
    saga = (await store.record(move(saga, status=SagaStatus.FAILED, undo_failed=(0,), release=True))).saga
    asked = (
        retry(saga_id=saga.saga_id, before={"revision": 2}, after={"revision": 3, "undo": ["a"]}),
        retry(action=AuditAction.MARK_DONE, saga_id=saga.saga_id, step_name="a", reason="by hand, Zoë"),
    )
    again = move(saga, status=SagaStatus.COMPENSATING, undo_plan=(0,), undo_failed=(), attempt=1, release=True)
    again = msgspec.structs.replace(again, audit=asked)
    recorded = await store.record(again)
    assert recorded.saga.status is SagaStatus.COMPENSATING
    assert (await entered(store))[:2] == [asked[1], asked[0]]
    with pytest.raises(LeaseLost):
        await store.record(again)
    assert len(await log_of(store)) == 3
    # And it is a move like any other.
    assert await store.get(saga.saga_id) == recorded.saga
    (claimed,) = await store.claim_due_sagas("worker-2", 1)
    assert claimed.saga.revision == recorded.saga.revision


@with_sql
async def test_a_move_whose_entry_is_refused_does_not_happen(store: Store, database: Database) -> None:
    saga = await running(store)
    asked = retry(saga_id=saga.saga_id, workflow_version=2**70)
    with pytest.raises(RowRejected):
        await store.record(msgspec.structs.replace(move(saga, status=SagaStatus.COMPLETED), audit=(asked,)))
    assert await store.get(saga.saga_id) == saga
    assert [entry.action for entry in await entered(store)] == [AuditAction.START_SAGA]


@with_sql
async def test_a_creation_whose_entry_is_refused_does_not_happen_and_spoils_no_other(
    store: Store, database: Database
) -> None:
    bad = new_saga(asked_by=Requester(principal=None, door=Door.REST))  # type: ignore[arg-type]  # what no door sends
    with pytest.raises(RowRejected):
        await store.create(bad)
    assert await store.get(bad.saga_id) is None
    await created(store)


@with_sql
async def test_a_cancel_or_a_definition_whose_entry_is_refused_is_not_kept(store: Store, database: Database) -> None:
    saga = await running(store)
    await store.register_workflow(definition("a"), "1", ALICE)
    before = await log_of(store)
    nobody = Requester(principal=None, door=Door.REST)  # type: ignore[arg-type]  # what no door sends
    with pytest.raises(RowRejected):
        await store.request_cancel_unless_terminal(saga.saga_id, nobody)
    with pytest.raises(RowRejected):
        await store.register_workflow(definition("a", "b"), "2", nobody)
    assert await store.get(saga.saga_id) == saga
    assert [workflow.version for workflow in await store.workflows()] == [1]
    assert await log_of(store) == before
    # Nor does it spoil what comes after it.
    await store.request_cancel_unless_terminal(saga.saga_id, BOB)
    assert len(await log_of(store)) == len(before) + 1


async def test_a_denied_request_is_entered_by_itself(store: Store, clock: StandingClock) -> None:
    clock.advance(5)
    await store.add_audit_entry(denied(saga_id="6f1b1a52-8a5c-4a1e-9d0e-0a3f0a3f0a3f", after={"left_out": 3}))
    (entry,) = await log_of(store)
    assert entry.created_at == clock.instant
    assert entry.entered == denied(saga_id="6f1b1a52-8a5c-4a1e-9d0e-0a3f0a3f0a3f", after={"left_out": 3})


async def test_entries_outlive_their_saga(store: Store, database: Database, clock: StandingClock) -> None:
    saga = await running(store, asked_by=ALICE)
    await store.record(move(saga, status=SagaStatus.COMPLETED, release=True))
    database.publish(store, saga.saga_id)
    clock.advance(100)
    assert await store.remove_ended_before(10, 10) == 1
    assert [entry.saga_id for entry in await entered(store)] == [saga.saga_id]


# --- lists ------------------------------------------------------------------------------------------------------------


async def test_the_log_is_read_newest_first_in_stretches_that_meet(store: Store, clock: StandingClock) -> None:
    for number in range(7):
        await store.add_audit_entry(denied(request_number(number)))
        clock.advance(number % 2)  # several in one instant, too
    seen: list[str | None] = []
    after = None
    stretches = 0
    while True:
        stretch = await store.list_audit(EVERYTHING, limit=3, after=after)
        seen += [entry.entered.asked_by.request_id for entry in stretch.entries]
        stretches += 1
        # What comes meanwhile is newer than what is read, and moves nothing.
        await store.add_audit_entry(denied(request_number(99)))
        if (after := stretch.next_cursor) is None:
            break
    assert seen == [str(number) for number in range(6, -1, -1)]
    assert stretches == 3


def request_number(number: int) -> Requester:
    return msgspec.structs.replace(BOB, request_id=str(number))


async def test_the_log_is_filtered_by_saga_principal_action_and_time(store: Store, clock: StandingClock) -> None:
    first = await created(store, asked_by=ALICE)
    clock.advance(10)
    noon = clock.instant
    second = await created(store, asked_by=BOB)
    clock.advance(10)
    await store.request_cancel_unless_terminal(first.saga_id, BOB)
    await store.register_workflow(definition("a"), "1", ALICE)

    async def found(**where: Any) -> list[tuple[str, str]]:
        return [(one.action.value, one.asked_by.principal) for one in await entered(store, AuditFilter(**where))]

    assert await found(saga_id=first.saga_id) == [("CANCEL_SAGA", "bob"), ("START_SAGA", "alice")]
    assert await found(saga_id=first.saga_id, principal="alice") == [("START_SAGA", "alice")]
    assert await found(saga_id=first.saga_id, action=AuditAction.CANCEL_SAGA) == [("CANCEL_SAGA", "bob")]
    assert await found(saga_id=second.saga_id, created_before=noon) == []
    assert await found(principal="alice") == [("REGISTER_WORKFLOW", "alice"), ("START_SAGA", "alice")]
    assert await found(action=AuditAction.START_SAGA) == [("START_SAGA", "bob"), ("START_SAGA", "alice")]
    assert await found(created_after=noon, created_before=noon + timedelta(seconds=1)) == [("START_SAGA", "bob")]
    assert await found(created_before=noon) == [("START_SAGA", "alice")]
    assert await found(principal="nobody") == []
    first_of_saga = await store.list_audit(AuditFilter(saga_id=first.saga_id), limit=1)
    assert [entry.entered.action for entry in first_of_saga.entries] == [AuditAction.CANCEL_SAGA]
    rest = await store.list_audit(AuditFilter(saga_id=first.saga_id), limit=1, after=first_of_saga.next_cursor)
    assert [entry.entered.action for entry in rest.entries] == [AuditAction.START_SAGA]
    assert rest.next_cursor is None


# --- nothing is changed, and nothing goes but by age ------------------------------------------------------------------


ATTEMPTS = (
    "UPDATE saga.audit_log SET principal = 'mallory'",
    "UPDATE saga.audit_log SET created_at = created_at",
    "DELETE FROM saga.audit_log",
    "DELETE FROM saga.audit_log WHERE principal = 'alice'",
)
POSTGRES_ATTEMPTS = (
    "TRUNCATE saga.audit_log",
    "TRUNCATE saga.saga_states, saga.audit_log CASCADE",
    "INSERT INTO saga.audit_log OVERRIDING SYSTEM VALUE SELECT * FROM saga.audit_log"
    " ON CONFLICT (created_at, id) DO UPDATE SET principal = 'mallory'",
)
SQLITE_ATTEMPTS = (
    "REPLACE INTO saga.audit_log SELECT * FROM saga.audit_log",
    "UPDATE OR REPLACE saga.audit_log SET principal = 'mallory'",
    "INSERT INTO saga.audit_log SELECT * FROM saga.audit_log WHERE true"
    " ON CONFLICT (id) DO UPDATE SET principal = 'mallory'",
)


@with_sql
async def test_the_database_refuses_to_change_or_remove_an_entry(store: Store, database: Database) -> None:
    await created(store, asked_by=ALICE)
    before = await log_of(store)
    for attempt in ATTEMPTS + (POSTGRES_ATTEMPTS if database.kind == "postgres" else SQLITE_ATTEMPTS):
        with pytest.raises((asyncpg.PostgresError, sqlite3.IntegrityError), match="append-only"):
            database.ask(store, attempt)
        assert await log_of(store) == before


async def test_entries_go_when_they_are_old_enough_oldest_first_and_in_batches(
    store: Store, clock: StandingClock
) -> None:
    for number in range(4):
        await store.add_audit_entry(denied(request_number(number)))
        clock.advance(10)
    assert await store.remove_audit_before(40, 10) == 0
    assert await store.remove_audit_before(15, 2) == 2
    assert [entry.asked_by.request_id for entry in await entered(store)] == ["3", "2"]
    assert await store.remove_audit_before(15, 2) == 1
    assert await store.remove_audit_before(15, 2) == 0
    assert [entry.asked_by.request_id for entry in await entered(store)] == ["3"]


@with_sql
async def test_after_a_removal_the_database_refuses_again(
    store: Store, database: Database, clock: StandingClock
) -> None:
    for _ in range(2):
        await store.add_audit_entry(denied())
    clock.advance(1000)
    assert await store.remove_audit_before(10, 1) == 1
    with pytest.raises((asyncpg.PostgresError, sqlite3.IntegrityError), match="append-only"):
        database.ask(store, "DELETE FROM saga.audit_log")
    assert len(await log_of(store)) == 1
