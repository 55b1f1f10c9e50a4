"""Sagas, moves and stores for the suite, and a clock that stands still until it is told."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec

from bridge import open_loop
from saga.model import EventType, LogEntry, Saga, SagaEvent, SagaStatus, StepAction, StepStatus
from saga.ports import NewSaga, Record, Store
from saga.workflow import Step, WorkflowDefinition
from store.postgres import open_postgres
from store.sqlite import SqliteStore, open_sqlite
from tests.simulation.door import Door
from tests.simulation.tables import Tables
from tests.support.postgres import in_plain_loop

WORKER = "worker-1"


class StandingClock:
    """Every store of the suite takes its instants from here, Postgres too."""

    def __init__(self) -> None:
        self.instant = datetime(2030, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)

    def now(self) -> datetime:
        return self.instant

    def advance(self, secs: float) -> None:
        self.instant += timedelta(seconds=secs)


@dataclass(frozen=True)
class Database:
    """Where a store of the suite keeps its rows."""

    kind: str
    address: str

    @asynccontextmanager
    async def opened(self, clock: StandingClock, *, events: bool = True) -> AsyncIterator[Store]:
        if self.kind == "postgres":
            async with open_loop(), open_postgres(self.address, events=events, clock=clock) as postgres:
                yield postgres
        elif self.kind == "simulated":
            yield Door(Tables(clock, events=events))
        else:
            async with open_sqlite(self.address, events=events, clock=clock) as sqlite:
                yield sqlite

    def ask(self, store: Store, sql: str, *arguments: str) -> list[tuple[Any, ...]]:
        """What the tables hold, past the port. `sql` names tables as `saga.…` and their one parameter as `$1`."""
        if self.kind == "postgres":

            async def body() -> list[tuple[Any, ...]]:
                connection = await asyncpg.connect(self.address)
                try:
                    return [tuple(row) for row in await connection.fetch(sql, *arguments)]
                finally:
                    await connection.close()

            return in_plain_loop(body)
        sql = sql.replace("saga.", "").replace("$1", "?")
        if self.kind == "simulated":
            assert isinstance(store, Door)
            assert isinstance(store.database, Tables)
            return store.database.ask(sql, *arguments)
        if self.kind == "sqlite_memory":
            assert isinstance(store, SqliteStore)
            # The database lives in that connection and nowhere else.
            return [tuple(row) for row in store._writer._connection.execute(sql, arguments).fetchall()]
        connection = sqlite3.connect(self.address, isolation_level=None)
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            return [tuple(row) for row in connection.execute(sql, arguments).fetchall()]
        finally:
            connection.close()

    def outbox(self, store: Store, saga_id: str) -> list[tuple[Any, ...]]:
        """The announcements of a saga, in order."""
        return self.ask(
            store,
            "SELECT event_type, status, current_step, error_message FROM saga.outbox WHERE saga_id = $1 ORDER BY id",
            saga_id,
        )

    def publish(self, store: Store, saga_id: str) -> None:
        """What the relay leaves behind once a saga's announcements are acknowledged."""
        if self.kind == "simulated":
            assert isinstance(store, Door)
            assert isinstance(store.database, Tables)
            store.database.publish_all(saga_id)
        else:
            self.ask(store, "UPDATE saga.outbox SET published_at = created_at WHERE saga_id = $1", saga_id)


def new_saga(**changes: Any) -> NewSaga:
    fields: dict[str, Any] = {
        "saga_id": str(uuid.uuid4()),
        "workflow_name": "order",
        "workflow_version": 1,
        "payload": {"order": 7},
    }
    return NewSaga(**(fields | changes))


async def created(store: Store, **changes: Any) -> Saga:
    return (await store.create(new_saga(**changes))).saga


async def running(store: Store, **changes: Any) -> Saga:
    """A saga that WORKER runs, its first attempt on the way."""
    saga = await created(store, **({"owner": WORKER} | changes))
    return (await store.record(move(saga, status=SagaStatus.RUNNING, attempt=1))).saga


def move(
    saga: Saga,
    *,
    logs: tuple[LogEntry, ...] = (),
    events: tuple[SagaEvent, ...] = (),
    retry_in_secs: float | None = None,
    deadline_in_secs: float | None = None,
    release: bool = False,
    **changes: Any,
) -> Record:
    after = msgspec.structs.replace(saga, **changes)
    return Record(
        before=saga,
        after=after,
        logs=logs,
        events=events,
        path=(after,),
        retry_in_secs=retry_in_secs,
        deadline_in_secs=deadline_in_secs,
        release=release,
    )


def log_entry(step_index: int = 0, **changes: Any) -> LogEntry:
    at = datetime(2030, 1, 1, 11, 59, 58, 1, tzinfo=UTC)
    fields: dict[str, Any] = {
        "step_index": step_index,
        "step_name": f"step-{step_index}",
        "action": StepAction.EXECUTE,
        "status": StepStatus.SUCCESS,
        "started_at": at,
        "completed_at": at + timedelta(milliseconds=1500),
        "attempts": 1,
    }
    return LogEntry(**(fields | changes))


def event(event_type: EventType, status: SagaStatus, current_step: int = 0, error: str | None = None) -> SagaEvent:
    return SagaEvent(event_type=event_type, status=status, current_step=current_step, error_message=error)


def definition(*steps: str, name: str = "order") -> WorkflowDefinition:
    return WorkflowDefinition(
        name=name, steps=tuple(Step(name=step, service="shop", method="Shop.Do") for step in steps)
    )
