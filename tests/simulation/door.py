"""The way of one worker to the database: `saga.ports.Store` over tables that answer at once, with the network between.

Without weather it is a plain store; the shared suite of `tests/store` runs on it. With weather a request or its answer
may be slow or lost, may land after its sender was told that it failed, and the worker may die before, during or after
any exchange. What a dead worker sent may still land; nothing that it says afterwards does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol, TypeVar, cast

import msgspec
import outcome
import trio

from saga.audit import IN_PROCESS, AuditEntries, AuditFilter, NewAuditEntry, Requester
from saga.errors import Unavailable
from saga.model import Saga, SagaStatus, StepLog
from saga.ports import (
    CancelAccepted,
    Claimed,
    Created,
    NewSaga,
    Notice,
    NoticesMissed,
    Page,
    Record,
    Recorded,
    Registered,
    SagaFilter,
    SagasDue,
    SchemaState,
    UndoDebt,
)
from saga.saga_id import canonical_saga_id
from saga.workflow import Workflow, WorkflowDefinition
from store import rows
from store.outbox import Bell
from store.rows import CreateRow, MoveRow

T = TypeVar("T")


class Database(Protocol):
    """Tables that answer at once: `Tables`, or SQLite in memory (`store.sqlite_database.SqliteDatabase`)."""

    def write_batch(self, batch: Sequence[CreateRow | MoveRow]) -> list[Created | Recorded | Exception]: ...
    def get(self, saga_id: str) -> Saga | None: ...
    def step_logs(self, saga_id: str) -> list[StepLog]: ...
    def list_sagas(self, where: SagaFilter, limit: int, offset: int, after: tuple[datetime, str] | None) -> Page: ...
    def cancel_requests(self, worker_id: str) -> list[str]: ...
    def count_open(self) -> dict[SagaStatus, int]: ...
    def undo_debt(self) -> list[UndoDebt]: ...
    def schema_state(self) -> SchemaState: ...
    def ping(self) -> None: ...
    def request_cancel_unless_terminal(
        self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None
    ) -> Saga | None: ...
    def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]: ...
    def release(self, saga: Saga, interrupted: bool, retry_in_secs: float | None) -> bool: ...
    def register_worker(self, worker_id: str, lease_secs: float) -> None: ...
    def renew_lease(self, worker_id: str, lease_secs: float) -> bool: ...
    def release_expired_workers(self) -> int: ...
    def owned(self, worker_id: str) -> list[Saga]: ...
    def remove_worker(self, worker_id: str) -> None: ...
    def remove_ended_before(self, age_secs: float, limit: int) -> int: ...
    def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered: ...
    def add_audit_entry(self, entry: NewAuditEntry) -> None: ...
    def list_audit(self, where: AuditFilter, limit: int, after: tuple[datetime, int] | None) -> AuditEntries: ...
    def remove_audit_before(self, age_secs: float, limit: int) -> int: ...
    def workflow(self, name: str, version: int | None) -> Workflow | None: ...
    def workflows(self) -> list[Workflow]: ...


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """What befalls one exchange, in seconds from its beginning. `lands_after` None: the request never arrives.
    `answered_after`: when its sender is told; `lost`: it is told that the database cannot be reached."""

    lands_after: float | None
    answered_after: float
    lost: bool


class Weather(Protocol):
    """Decides, exchange by exchange, what goes wrong; None: nothing. It may let the worker die as well."""

    def of_exchange(self, door: Door, name: str) -> Trouble | None: ...
    def after_exchange(self, door: Door, name: str) -> None: ...
    def lands_although_dead(self) -> bool: ...
    def landed_late(self, door: Door, name: str) -> None: ...
    def of_notice(self, door: Door, notice: Notice) -> None: ...


class Watcher(Protocol):
    """Sees every write at the instant it lands."""

    def create(self, door: Door, row: CreateRow) -> Created | Exception: ...
    def move(self, door: Door, row: MoveRow) -> Recorded | Exception: ...


class _Pending:
    """An exchange whose sender waits."""

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.waits = True

    def answer(self, result: outcome.Outcome[Any]) -> None:
        if self.waits:
            self.waits = False
            trio.lowlevel.reschedule(self.task, result)


class Door:
    """Keeps `saga.ports.Store` over a database, for one worker.

    `die` makes it useless at once, for good. `nursery` is the network: what is under way there outlives the worker.
    """

    def __init__(
        self,
        database: Database,
        *,
        worker_id: str = "",
        nursery: trio.Nursery | None = None,
        weather: Weather | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.database = database
        self.worker_id = worker_id
        self.dead = False
        self.cut_off_until = 0.0
        self._nursery = nursery
        self._weather = weather
        self._watcher = watcher
        self._pending: dict[_Pending, None] = {}
        self._tell: Callable[[Notice], None] | None = None
        self.bell = Bell()
        """Rung when events of this worker are stored."""

    def die(self) -> None:
        self.dead = True
        for pending in list(self._pending):
            pending.answer(outcome.Error(Unavailable("dead")))

    # --- exchanges ---------------------------------------------------------------------------------------------------

    async def exchange(self, name: str, say: Callable[[], T], *, may_give_up: bool = False) -> T:
        """What `say` gives. A cancel comes before it or waits for its outcome, unless it `may_give_up`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        weather = self._weather
        trouble = None
        if weather is not None and not self.dead:
            trouble = weather.of_exchange(self, name)
        if self.dead:
            raise Unavailable("dead")
        if trouble is not None:
            return await self._troubled(name, trouble, say, may_give_up)
        result = say()
        if weather is not None:
            weather.after_exchange(self, name)
        # Others run between the write and its sender's next line, as they do on a real network.
        await trio.lowlevel.cancel_shielded_checkpoint()
        if self.dead:
            raise Unavailable("dead")
        return result

    async def _troubled(self, name: str, trouble: Trouble, say: Callable[[], T], may_give_up: bool) -> T:
        assert self._nursery is not None
        pending = _Pending()
        self._pending[pending] = None
        self._nursery.start_soon(self._carry, name, trouble, say, pending)

        def abort(_: object) -> trio.lowlevel.Abort:
            if not may_give_up:
                return trio.lowlevel.Abort.FAILED
            pending.waits = False
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            result: T = await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            del self._pending[pending]
        if self.dead:
            raise Unavailable("dead")
        return result

    async def _carry(self, name: str, trouble: Trouble, say: Callable[[], Any], pending: _Pending) -> None:
        """The exchange on its way, and the answer on its way back; they are in no order if the answer is a lie."""
        began = trio.current_time()
        result: outcome.Outcome[Any] = outcome.Error(Unavailable("the database cannot be reached"))
        told = trouble.lands_after is None or (trouble.lost and trouble.answered_after < trouble.lands_after)
        try:
            if told:
                await trio.sleep(trouble.answered_after)
                pending.answer(result)
            if trouble.lands_after is not None:
                await trio.sleep_until(began + trouble.lands_after)
                if not self.dead or (self._weather is not None and self._weather.lands_although_dead()):
                    landed = outcome.capture(say)
                    if self._weather is not None and not pending.waits:
                        self._weather.landed_late(self, name)
                    if not trouble.lost:
                        result = landed
            if not told:
                await trio.sleep_until(began + trouble.answered_after)
        finally:
            pending.answer(result)

    def _create(self, row: CreateRow) -> Created:
        self.bell.ring()
        watcher = self._watcher
        created = _given(self.database.write_batch([row])[0] if watcher is None else watcher.create(self, row))
        if row.new.owner is None:
            self._notify(SagasDue())
        return cast(Created, created)

    def _move(self, row: MoveRow) -> Recorded:
        if row.record.events:
            self.bell.ring()
        watcher = self._watcher
        return cast(
            Recorded, _given(self.database.write_batch([row])[0] if watcher is None else watcher.move(self, row))
        )

    def _cancel(self, saga_id: str, asked_by: Requester, reason: str | None) -> Saga | None:
        saga = self.database.request_cancel_unless_terminal(saga_id, asked_by, reason)
        if saga is not None and not saga.status.is_terminal:
            self._notify(SagasDue() if saga.owner is None else CancelAccepted(saga_id=saga_id, owner=saga.owner))
        return saga

    def _freed(self, result: T) -> T:
        """Passes on what a write gave that may have freed sagas, and tells the others."""
        if result is None or result:
            self._notify(SagasDue())
        return result

    # --- the port ----------------------------------------------------------------------------------------------------

    async def create(self, new: NewSaga) -> Created:
        row = rows.prepare_create(new)
        return await self.exchange("create", lambda: self._create(row))

    async def record(self, record: Record) -> Recorded:
        row = rows.prepare_move(record)
        return await self.exchange("record", lambda: self._move(row))

    async def get(self, saga_id: str) -> Saga | None:
        known = canonical_saga_id(saga_id)
        return None if known is None else await self.exchange("get", lambda: self.database.get(known))

    async def step_logs(self, saga_id: str) -> list[StepLog]:
        known = canonical_saga_id(saga_id)
        return [] if known is None else await self.exchange("step_logs", lambda: self.database.step_logs(known))

    async def list_sagas(
        self, where: SagaFilter, *, limit: int, offset: int = 0, after: tuple[datetime, str] | None = None
    ) -> Page:
        return await self.exchange("list_sagas", lambda: self.database.list_sagas(where, limit, offset, after))

    async def request_cancel_unless_terminal(
        self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None
    ) -> Saga | None:
        known = canonical_saga_id(saga_id)
        if known is None:
            return None
        return await self.exchange("request_cancel_unless_terminal", lambda: self._cancel(known, asked_by, reason))

    async def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]:
        return await self.exchange("claim_due_sagas", lambda: self.database.claim_due_sagas(worker_id, limit))

    async def release(self, saga: Saga, *, interrupted: bool, retry_in_secs: float | None = None) -> bool:
        return await self.exchange(
            "release", lambda: self._freed(self.database.release(saga, interrupted, retry_in_secs))
        )

    async def register_worker(self, worker_id: str, lease_secs: float) -> None:
        await self.exchange("register_worker", lambda: self.database.register_worker(worker_id, lease_secs))

    async def renew_lease(self, worker_id: str, lease_secs: float) -> bool:
        return await self.exchange(
            "renew_lease", lambda: self.database.renew_lease(worker_id, lease_secs), may_give_up=True
        )

    async def release_expired_workers(self) -> int:
        return await self.exchange(
            "release_expired_workers", lambda: self._freed(self.database.release_expired_workers())
        )

    async def cancel_requests(self, worker_id: str) -> Sequence[str]:
        return await self.exchange("cancel_requests", lambda: self.database.cancel_requests(worker_id))

    async def owned(self, worker_id: str) -> Sequence[Saga]:
        return await self.exchange("owned", lambda: self.database.owned(worker_id))

    async def remove_worker(self, worker_id: str) -> None:
        def say() -> None:
            self.database.remove_worker(worker_id)
            self._notify(SagasDue())

        await self.exchange("remove_worker", say, may_give_up=True)

    async def remove_ended_before(self, age_secs: float, limit: int) -> int:
        return await self.exchange(
            "remove_ended_before", lambda: self.database.remove_ended_before(age_secs, limit), may_give_up=True
        )

    async def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered:
        return await self.exchange(
            "register_workflow", lambda: self.database.register_workflow(definition, source, asked_by)
        )

    async def add_audit_entry(self, entry: NewAuditEntry) -> None:
        await self.exchange("add_audit_entry", lambda: self.database.add_audit_entry(entry))

    async def list_audit(
        self, where: AuditFilter, *, limit: int, after: tuple[datetime, int] | None = None
    ) -> AuditEntries:
        return await self.exchange("list_audit", lambda: self.database.list_audit(where, limit, after))

    async def remove_audit_before(self, age_secs: float, limit: int) -> int:
        return await self.exchange(
            "remove_audit_before", lambda: self.database.remove_audit_before(age_secs, limit), may_give_up=True
        )

    async def workflow(self, name: str, version: int | None = None) -> Workflow | None:
        return await self.exchange("workflow", lambda: self.database.workflow(name, version))

    async def workflows(self) -> Sequence[Workflow]:
        return await self.exchange("workflows", self.database.workflows)

    async def listen(self, tell: Callable[[Notice], None]) -> None:
        """Without weather every notice is lost: what the poll behind them is for."""
        if self._weather is not None:
            self._tell = tell
            tell(NoticesMissed())
        await trio.sleep_forever()

    def hear(self, notice: Notice) -> None:
        """What another worker did has come this far."""
        if self._tell is not None and not self.dead:
            self._tell(notice)

    def _notify(self, notice: Notice) -> None:
        if self._weather is not None:
            self._weather.of_notice(self, notice)

    async def ping(self) -> None:
        await self.exchange("ping", self.database.ping)

    async def count_open(self) -> dict[SagaStatus, int]:
        return await self.exchange("count_open", self.database.count_open)

    async def undo_debt(self) -> Sequence[UndoDebt]:
        return await self.exchange("undo_debt", self.database.undo_debt)

    async def schema_state(self) -> SchemaState:
        return await self.exchange("schema_state", self.database.schema_state)


def _given(result: object) -> object:
    if isinstance(result, Exception):
        raise result
    return result
