"""What the engine needs from outside: a store, a step caller, a clock; and the results they give.

Everything here is a Trio-flavoured promise. `store/` and `rpc/` keep it; tests keep it with the real SQLite store
in memory and with participants written down as data.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

import msgspec

from saga.audit import IN_PROCESS, AuditEntries, AuditFilter, NewAuditEntry, Requester
from saga.model import Json, LogEntry, Saga, SagaEvent, SagaStatus, StepAction, StepLog
from saga.workflow import Workflow, WorkflowDefinition


class Clock(Protocol):
    """Wall time for instants that are stored or shown. Waits use `trio.current_time()`."""

    def now(self) -> datetime:
        """The current instant, UTC, aware."""
        ...


# --- calling a participant -------------------------------------------------------------------------------------------


class Outcome(enum.StrEnum):
    """What a caller can know of one attempt (spec section 3)."""

    DONE = "done"
    REFUSED = "refused"
    """The participant answered that it did not do it."""
    UNKNOWN = "unknown"
    """It may or may not have been done."""
    NOT_DONE = "not_done"
    """The call never left, or could not be built."""


class StepCall(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to be made.

    `request` is the JSON object to send; `strict`: keys the request message lacks fail the call (it came from an
    `input`) instead of being dropped. `timeout_secs` is the deadline of this attempt. `idempotency_key` is the same for
    every attempt of the same action of the same saga.
    """

    service: str
    method: str
    request: Json
    strict: bool
    timeout_secs: float
    saga_id: str
    workflow_name: str
    step_name: str
    step_index: int
    action: StepAction
    attempt: int
    epoch: int
    idempotency_key: str
    correlation_id: str | None
    traceparent: str
    tracestate: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one attempt. `code` is the gRPC code name (`OK` when done).

    `permanent`: trying again cannot help whatever the retry policy says (the request cannot be built, the method
    does not exist, the answer is over the limit). `retry_after_secs`: the pause the participant asks for
    (`google.rpc.RetryInfo`).
    """

    outcome: Outcome
    code: str = "OK"
    message: str = ""
    response: Json | None = None
    retry_after_secs: float | None = None
    permanent: bool = False


class StepCaller(Protocol):
    """Makes one attempt; never raises for anything a participant or the network does."""

    async def call(self, call: StepCall) -> Answer:
        """Makes the attempt and says what came of it. Cancelled: the call in flight is reset at once."""
        ...


# --- the store -------------------------------------------------------------------------------------------------------


class NewSaga(msgspec.Struct, frozen=True, kw_only=True):
    """A saga to be created as STARTED. `owner`: the worker that will run it at once; None: it waits to be claimed.

    `request_digest` stands for the body of the request that came with `idempotency_key`; the same key with another
    digest is a `Conflict`. `asked_by` is entered in the audit log with the creation.
    """

    saga_id: str
    workflow_name: str
    workflow_version: int
    payload: Json
    correlation_id: str | None = None
    initiated_by: str | None = None
    idempotency_key: str | None = None
    request_digest: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    owner: str | None = None
    asked_by: Requester = IN_PROCESS


class Created(msgspec.Struct, frozen=True, kw_only=True):
    """The saga that exists now; `replayed`: an earlier request with the same key and body had made it."""

    saga: Saga
    replayed: bool = False


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One move of one saga, written whole or not at all.

    `before` is the saga the decision was taken from: the write lands only where the row still has its `owner`,
    `epoch` and `revision`, and, when `after` is COMPLETED or FAILED, no cancel request. `after` is the state to store;
    the store sets `revision` to `before.revision + 1`, `updated_at` to its own time, `next_attempt_at` to its own time
    plus `retry_in_secs` (None: no instant; none either for a RUNNING saga with a cancel request, which no pause puts
    off), and `deadline_at` to its own time plus `deadline_in_secs` (None: unchanged). It never writes
    `cancel_requested`. `path` is every state passed through, in order, `after` last: what watchers see.
    `release`: the row is given up (owner NULL) by this same write. `audit`: who asked for the move, if anybody did.
    """

    before: Saga
    after: Saga
    logs: tuple[LogEntry, ...] = ()
    events: tuple[SagaEvent, ...] = ()
    path: tuple[Saga, ...] = ()
    retry_in_secs: float | None = None
    deadline_in_secs: float | None = None
    release: bool = False
    audit: tuple[NewAuditEntry, ...] = ()


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What `record` tells of a write that landed, or, `landed` False, of one that did not because a cancel request had
    come first (only possible for a move to COMPLETED or FAILED). `saga` is the row as it is now."""

    saga: Saga
    landed: bool = True


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """A saga that this worker owns from now on, with what it needs to go on.

    `due_in_secs`: seconds until the next attempt is due (0: at once), `deadline_in_secs`: seconds until the workflow's
    deadline (negative: past; None: none), both by the store's clock. `responses` maps the name of each succeeded step
    to its response.
    """

    saga: Saga
    due_in_secs: float = 0.0
    deadline_in_secs: float | None = None
    responses: dict[str, Json] = {}


class SagaFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which sagas a list holds; None: any. `created_after` is inclusive, `created_before` exclusive."""

    workflow_name: str | None = None
    status: SagaStatus | None = None
    correlation_id: str | None = None
    compensation_failed: bool | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of a list, newest first. `next_cursor` continues after it; None: it was the last."""

    sagas: tuple[Saga, ...]
    total_count: int
    next_cursor: tuple[datetime, str] | None = None


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """The version a definition has; `changed` False: the same text was there already."""

    version: int
    changed: bool


class UndoDebt(msgspec.Struct, frozen=True, kw_only=True):
    """What the sagas of one workflow owe: effects that should be undone and are not.

    `failed`: compensations that failed for good and were neither run again nor marked done since. `pending`:
    compensations still to come of sagas that are COMPENSATING, the one in hand included; a step without a compensation
    owes none. `oldest_secs`: how long ago the saga that has owed longest began to compensate.
    """

    workflow_name: str
    failed: int
    pending: int
    oldest_secs: float


class SchemaState(enum.StrEnum):
    """How the tables of a database stand to this release."""

    CURRENT = "current"
    OLDER = "older"
    """Migrations of this release are missing."""
    NEWER = "newer"
    """Migrated by a later release as well."""
    CHANGED = "changed"
    """Migrated by other files than this release has."""


# --- notices ---------------------------------------------------------------------------------------------------------


class SagasDue(msgspec.Struct, frozen=True, tag="due"):
    """A saga that nobody owns is due now."""


class CancelAccepted(msgspec.Struct, frozen=True, tag="cancel"):
    """A saga that `owner` runs is asked to be cancelled."""

    saga_id: str
    owner: str


class WorkflowAdded(msgspec.Struct, frozen=True, tag="workflow"):
    """A workflow has a new version."""

    name: str


class NoticesMissed(msgspec.Struct, frozen=True, tag="missed"):
    """Anything may have happened since the last notice, or before the first."""


Notice = SagasDue | CancelAccepted | WorkflowAdded | NoticesMissed
"""What another worker has done to the store. A hint to look: it may be lost, and may come late or for nothing."""


# --- the store itself ------------------------------------------------------------------------------------------------


class Store(Protocol):
    """What is remembered. Every method raises `Unavailable` when the database cannot be reached."""

    async def create(self, new: NewSaga) -> Created:
        """Durable when it returns, with its SAGA_STARTED event. `Conflict`: key known with another digest."""
        ...

    async def record(self, record: Record) -> Recorded:
        """Durable when it returns. `LeaseLost`: the fence did not hold, nothing changed. `RowRejected`: this row cannot
        be stored. Sent again after `Unavailable` it lands once. A cancel during it does not abandon the write."""
        ...

    async def get(self, saga_id: str) -> Saga | None: ...

    async def step_logs(self, saga_id: str) -> list[StepLog]:
        """Oldest first."""
        ...

    async def list_sagas(
        self, where: SagaFilter, *, limit: int, offset: int = 0, after: tuple[datetime, str] | None = None
    ) -> Page:
        """Newest first by (created_at, id); `after` continues behind that key, else `offset` rows are passed over."""
        ...

    async def request_cancel_unless_terminal(
        self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None
    ) -> Saga | None:
        """Marks the cancel request, durably, and makes a waiting saga due at once, save one that compensates; enters
        who asked, and why. Returns the row as it is now (of a terminal saga unchanged: look at its status); None: no
        such saga."""
        ...

    async def claim_due_sagas(self, worker_id: str, limit: int) -> list[Claimed]:
        """Takes up to `limit` unowned open sagas that are due, oldest first; their epoch rises by one."""
        ...

    async def release(self, saga: Saga, *, interrupted: bool, retry_in_secs: float | None = None) -> bool:
        """Gives the saga up if it is open and still owned at this epoch. `interrupted`: an attempt was cut off, so the
        outcome of the step in hand is unknown. With `retry_in_secs` nobody claims it before that. False: it was not."""
        ...

    async def register_worker(self, worker_id: str, lease_secs: float) -> None: ...

    async def renew_lease(self, worker_id: str, lease_secs: float) -> bool:
        """False: the lease had ended and the sagas may have other owners."""
        ...

    async def release_expired_workers(self) -> int:
        """Removes workers whose lease has ended and frees their sagas, marking RUNNING ones `outcome_unknown`.
        Returns the number of sagas freed. (Embedded store: at start, every other worker counts as ended.)"""
        ...

    async def cancel_requests(self, worker_id: str) -> Sequence[str]:
        """Ids of this worker's sagas that are asked to be cancelled and are not compensating yet: the request may have
        been accepted by another worker."""
        ...

    async def owned(self, worker_id: str) -> Sequence[Saga]:
        """The open sagas of this worker. For one that cannot know whether a write of its own has given it more than it
        runs."""
        ...

    async def remove_worker(self, worker_id: str) -> None:
        """Frees whatever it still owns as `release_expired_workers` does, then removes it."""
        ...

    async def remove_ended_before(self, age_secs: float, limit: int) -> int:
        """Removes up to `limit` sagas that ended longer than `age_secs` ago, longest first, with their logs, published
        events and idempotency keys; those with an unpublished event stay. Returns how many; 0 also where another
        process is at it just now."""
        ...

    async def register_workflow(
        self, definition: WorkflowDefinition, source: str, asked_by: Requester = IN_PROCESS
    ) -> Registered:
        """Version n+1 if the definition differs from the newest of its name, with who asked for it; else the newest
        version as it is, and nothing is entered."""
        ...

    async def workflow(self, name: str, version: int | None = None) -> Workflow | None:
        """That version, or the newest."""
        ...

    async def workflows(self) -> Sequence[Workflow]:
        """The newest version of each, by name."""
        ...

    async def add_audit_entry(self, entry: NewAuditEntry) -> None:
        """Enters what changed nothing (a denied request); whatever changes something enters it by the same write."""
        ...

    async def list_audit(
        self, where: AuditFilter, *, limit: int, after: tuple[datetime, int] | None = None
    ) -> AuditEntries:
        """Newest first by (created_at, number); `after` continues behind that key."""
        ...

    async def remove_audit_before(self, age_secs: float, limit: int) -> int:
        """Removes up to `limit` entries that are older than `age_secs`, oldest first; the one way by which any goes.
        Returns how many."""
        ...

    async def listen(self, tell: Callable[[Notice], None]) -> None:
        """Tells each notice of what others commit, as it comes, until it is cancelled; `NoticesMissed` whenever it
        begins to listen (again). Never raises `Unavailable`: it listens anew by itself. `tell` returns at once.
        (Embedded store: there are no others, it tells nothing.)"""
        ...

    async def ping(self) -> None:
        """Returns if the database answers and, as far as the last writes tell, takes writes; raises `Unavailable`."""
        ...

    async def count_open(self) -> dict[SagaStatus, int]:
        """How many sagas are in each non-final state."""
        ...

    async def undo_debt(self) -> Sequence[UndoDebt]:
        """What is owed now, by workflow name; workflows that owe nothing are not in it."""
        ...

    async def schema_state(self) -> SchemaState: ...
