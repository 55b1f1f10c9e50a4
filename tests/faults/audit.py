"""What must be true of every saga in the end, whatever happened to the servers: books, rows and events.

The sagas are those of two workflows, one that completes and one whose last step is refused, with a participant that
does the work of an idempotency key once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tests.faults.load import Load
from tests.faults.test_kill import by_saga
from tests.support.kafka import Received, first_of_each
from tests.support.participants import Call
from tests.support.postgres import ask

STEPS = """\
name: {name}
steps:
  - {{name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release, {rest}}}
  - {{name: charge, service: shop, method: Payments.Charge, compensate: Payments.Refund, {rest}}}
  - {{name: last, service: shop, method: {last}, compensate: Shipping.Recall, {rest}}}
"""
PATIENT = "retry: {max_attempts: 50, initial_interval_ms: 20, max_interval_ms: 200}"
REST = f"on_unknown: compensate, {PATIENT}, compensate_{PATIENT}"
GOOD = STEPS.format(name="good", last="Shipping.Ship", rest=REST)
DOOMED = STEPS.format(name="doomed", last="Shipping.Insure", rest=REST)
"""The participant is to refuse `Insure`."""
ENDS = {"good": "COMPLETED", "doomed": "FAILED"}
REFUSES: Mapping[str, Any] = {"status": "FAILED_PRECONDITION", "message": "no"}

TOLD = {
    "COMPLETED": ["SAGA_STARTED", "SAGA_RUNNING", "SAGA_COMPLETED"],
    "FAILED": ["SAGA_STARTED", "SAGA_RUNNING", "SAGA_COMPENSATING", "SAGA_FAILED"],
}
"""The events of a saga by how it ended."""


def are_open(dsn: str) -> bool:
    """Whether a saga is still to end."""
    found = ask(dsn, "SELECT 1 FROM saga.saga_states WHERE status IN ('STARTED', 'RUNNING', 'COMPENSATING') LIMIT 1")
    return bool(found)


def check_store(dsn: str, clients: Load) -> None:
    """Every saga that was answered 201 is there, and no other, and each has ended as its workflow does. Who started it
    was entered with it, once."""
    assert not clients.unexpected
    assert set(clients.refused) <= {"SYS_SAGA_UNAVAILABLE"}
    stored = {
        str(row[0]): tuple(row[1:])
        for row in ask(dsn, "SELECT id, workflow_name, status, compensation_failed FROM saga.saga_states")
    }
    expected = {saga_id: (name, ENDS[name], False) for saga_id, name in clients.answered.items()}
    assert stored == expected, set(stored.items()) ^ set(expected.items())
    entered = [str(row[0]) for row in ask(dsn, "SELECT saga_id FROM saga.audit_log WHERE action = 'START_SAGA'")]
    assert sorted(entered) == sorted(expected)


def check_books(calls: Iterable[Call], answered: Mapping[str, str]) -> None:
    """No effect twice; of a completed saga all are there and none is undone, of a failed one all are undone, in
    reverse. (Undone may also be the last step, which never happened: its outcome was unknown.)"""
    made = by_saga(list(calls))
    assert made.keys() == answered.keys()
    for saga_id, workflow in answered.items():
        keys = [call.metadata["idempotency-key"] for call in made[saga_id] if call.effect]
        assert len(keys) == len(set(keys)), keys
        steps = [key.removeprefix(f"{saga_id}:").split(":") for key in keys]
        executed = {int(index) for index, action in steps if action == "execute"}
        undone = [int(index) for index, action in steps if action == "compensate"]
        if workflow == "good":
            assert (executed, undone) == ({0, 1, 2}, []), steps
        else:
            assert executed == {0, 1}, steps
            assert undone in ([1, 0], [2, 1, 0]), steps


def check_events(dsn: str, received: list[Received], answered: Mapping[str, str]) -> None:
    """Every event that was stored is on the topic, and no other; of each saga they are in the order in which they were
    stored, and tell of its states from the start to the end."""
    told: dict[str, list[str]] = defaultdict(list)
    types: dict[str, list[str]] = defaultdict(list)
    for one in first_of_each(received):
        assert one.key == one.value["saga_id"]
        told[one.key].append(one.event_id)
        types[one.key].append(one.event_type)
    stored: dict[str, list[str]] = defaultdict(list)
    for saga_id, event_id in ask(dsn, "SELECT saga_id, event_id FROM saga.outbox ORDER BY id"):
        stored[str(saga_id)].append(str(event_id))
    assert told == stored
    assert ask(dsn, "SELECT reason FROM saga.outbox_dead") == []
    assert types == {saga_id: TOLD[ENDS[name]] for saga_id, name in answered.items()}


def stored_events(dsn: str) -> int:
    count = ask(dsn, "SELECT count(*) FROM saga.outbox")[0][0]
    assert isinstance(count, int)
    return count
