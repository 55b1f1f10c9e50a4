"""Everything a client can ask for. REST, gRPC, the command line and the pages call this and nothing deeper.

Parsing a request into these calls and mapping their errors is the business of `web/` and `rpc/`.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import trio

from saga import transitions
from saga.admission import Admission
from saga.audit import IN_PROCESS, Requester, read_reason
from saga.audit_trail import AuditTrail
from saga.catalog import Catalog
from saga.endings import note_end
from saga.errors import Conflict, Detail, LeaseLost, NotFound, Unavailable, refused
from saga.facts import CancelObserved, UndoRetryRequested
from saga.json_bounds import encode_within_bounds
from saga.log_fields import note_saga
from saga.meter import Meter
from saga.model import Json, Saga, SagaStatus, StepLog
from saga.names import check_name
from saga.paging import check_page_size, read_cursor, write_cursor
from saga.payload_mask import NOTHING, PayloadMask
from saga.ports import Clock, NewSaga, Page, Record, SagaFilter, SchemaState, Store, UndoDebt
from saga.saga_id import canonical_saga_id
from saga.supervisor import Supervisor
from saga.tracing import TraceContext, Tracer, read_traceparent, read_tracestate
from saga.undo_corrections import read_corrections, retry_entries
from saga.watchers import Subscription, Watchers
from saga.workflow import Workflow, WorkflowDefinition
from saga.workflow_yaml import parse_workflow

log = logging.getLogger("saga.service")

MAX_WAIT_SECS = 60.0
ELSEWHERE_POLL_SECS = 0.5
"""How often a watcher reads the store for moves made by another worker."""


class StartSaga(msgspec.Struct, frozen=True, kw_only=True):
    """A request to start a saga, its types already checked. `traceparent` and `tracestate`: the caller's W3C trace
    context. `span_id`: that of the request's own span, if it has one; the saga's is below it."""

    workflow_name: str
    payload: Json = {}
    correlation_id: str | None = None
    initiated_by: str | None = None
    idempotency_key: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    span_id: str | None = None


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The saga that exists now, durably; `replayed`: an earlier request with this key had started it."""

    saga: Saga
    replayed: bool


class SagaDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A saga and what was done for it, oldest first."""

    saga: Saga
    step_logs: list[StepLog]


class RegisteredWorkflow(msgspec.Struct, frozen=True, kw_only=True):
    """The newest version of a workflow; `changed` False: the same definition was registered before.
    `superseded`: as an earlier version than the newest, and that stays."""

    workflow: Workflow
    changed: bool
    superseded: bool = False


class SagaPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of sagas, newest first. `has_next`: there are older ones; `next_cursor` leads to them."""

    sagas: tuple[Saga, ...]
    total_count: int
    page: int
    page_size: int
    has_next: bool
    next_cursor: str | None


class Watch:
    """The states of one saga, one at a time: first the state it is in, unless the watcher knew it already, then each
    one it passes through."""

    def __init__(self, service: SagaService, saga_id: str, moves: Subscription, known: Saga | None) -> None:
        self._service = service
        self._saga_id = saga_id
        self._moves = moves
        self._last = known
        self._read_revision = -1 if known is None else known.revision

    async def next(self) -> Saga | None:
        """The next state; None after a terminal one. `NotFound`: no such saga."""
        if self._last is None:
            return self._seen(await self._service.saga(self._saga_id))
        while not self._last.status.is_terminal:
            while (saga := self._moves.take()) is not None:
                # Several states of one move share its revision; those the store has shown are not told again.
                if saga.revision > self._read_revision:
                    self._last = saga
                    return saga
            with trio.move_on_after(ELSEWHERE_POLL_SECS):
                await self._moves.wait()
                continue
            saga = await self._service.saga(self._saga_id)
            if saga.revision > self._last.revision:
                return self._seen(saga)
        return None

    def _seen(self, saga: Saga) -> Saga:
        self._last = saga
        self._read_revision = saga.revision
        return saga


class SagaService:
    """What clients can do. All methods raise `Unavailable` when the store cannot be reached.

    Whatever changes something takes `asked_by`, for the audit log; left out, this process itself has asked. `audit` is
    that log.
    """

    def __init__(
        self,
        store: Store,
        supervisor: Supervisor,
        catalog: Catalog,
        watchers: Watchers,
        clock: Clock,
        *,
        services: Collection[str],
        max_payload_bytes: int,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
        admission: Admission | None = None,
        payload_mask: PayloadMask = NOTHING,
    ) -> None:
        self._store = store
        self._supervisor = supervisor
        self._catalog = catalog
        self._watchers = watchers
        self._clock = clock
        self.audit = AuditTrail(store)
        self._meter = meter or Meter()
        self._tracer = tracer or Tracer()
        self._admission = Admission() if admission is None else admission  # an empty one is falsy
        self._payload_mask = payload_mask
        self.known_services = services
        self.max_payload_bytes = max_payload_bytes

    async def start(self, request: StartSaga, asked_by: Requester = IN_PROCESS) -> Started:
        """Starts a saga; it is durable when this returns. One that says nothing of `initiated_by` is initiated by the
        client that asks, where clients are told apart.

        `NotFound`: no such workflow. `Invalid`: a field breaks its rule. `Conflict`: the idempotency key came before
        with another body. `Overloaded`: the store does not keep up; nothing was started. A caller that is
        cancelled meanwhile may find the saga started all the same.
        """
        body = self._check(request)
        with self._admission.start(self._meter):
            return await self._start(request, body, asked_by)

    async def _start(self, request: StartSaga, body: bytes, asked_by: Requester) -> Started:
        workflow = await self._catalog.newest(request.workflow_name)
        if missing := workflow.definition.services.difference(self.known_services):
            # What cannot be run here is not accepted here.
            raise Unavailable(f"services that are not configured here: {', '.join(sorted(missing))}")
        digest = None
        if request.idempotency_key is not None:
            digest = _digest(request, body)
        initiated_by = request.initiated_by
        if initiated_by is None and asked_by.is_identified:
            initiated_by = asked_by.principal
        saga_id = str(uuid.uuid4())
        context = _context_of(request, saga_id)
        with self._supervisor.place(saga_id) as place:
            created = await self._store.create(
                NewSaga(
                    saga_id=saga_id,
                    workflow_name=request.workflow_name,
                    workflow_version=workflow.version,
                    payload=request.payload,
                    correlation_id=request.correlation_id,
                    initiated_by=initiated_by,
                    idempotency_key=request.idempotency_key,
                    request_digest=digest,
                    traceparent=None if context is None else context.traceparent(),
                    tracestate=None if context is None else read_tracestate(request.tracestate),
                    owner=place.owner,
                    asked_by=asked_by,
                )
            )
            note_saga(created.saga)
            if not created.replayed:
                place.fill(created.saga, workflow)
        return Started(saga=created.saga, replayed=created.replayed)

    def _check(self, request: StartSaga) -> bytes:
        details: list[Detail] = []
        check_name(details, "workflow_name", request.workflow_name)
        for name in ("correlation_id", "initiated_by", "idempotency_key"):
            value: str | None = getattr(request, name)
            if value is not None:
                check_name(details, "Idempotency-Key" if name == "idempotency_key" else name, value)
        body = encode_within_bounds("payload", request.payload, self.max_payload_bytes, details)
        if details:
            raise refused(details)
        return body

    async def saga(self, saga_id: str) -> Saga:
        """`NotFound`: no such saga, or no id at all."""
        canonical = canonical_saga_id(saga_id)
        saga = await self._store.get(canonical) if canonical else None
        if saga is None:
            raise NotFound(f"saga not found: {saga_id}")
        note_saga(saga)
        return saga

    async def get(self, saga_id: str, *, wait_secs: float = 0.0) -> SagaDetail:
        """The saga and its step logs; with `wait_secs`, when it is terminal or that time is up."""
        if wait_secs <= 0:
            saga = await self.saga(saga_id)
        else:
            with self.watch(saga_id) as watch:
                state = await watch.next()
                with trio.move_on_after(wait_secs):
                    while state is not None:
                        saga = state
                        state = await watch.next()
        return SagaDetail(saga=saga, step_logs=await self._store.step_logs(saga.saga_id))

    @contextmanager
    def watch(self, saga_id: str, known: Saga | None = None) -> Iterator[Watch]:
        """Subscribes to a saga's moves for as long as the block lasts. `known`: the saga as a call has just given it;
        only what comes after it is told."""
        with self._watchers.subscribe(canonical_saga_id(saga_id) or saga_id) as moves:
            yield Watch(self, saga_id, moves, known)

    async def list_sagas(
        self, where: SagaFilter, *, page: int = 1, page_size: int = 20, cursor: str | None = None
    ) -> SagaPage:
        """A page, newest first. With `cursor` (from an earlier page) `page` is only echoed. `Invalid`: out of range."""
        details: list[Detail] = []
        if page < 1:
            details.append(Detail(field="page", reason="out_of_range", message="expected int >= 1"))
        check_page_size(details, page_size)
        for name in ("workflow_name", "correlation_id"):
            if (value := getattr(where, name)) is not None:
                check_name(details, name, value)
        after = read_cursor(details, cursor, canonical_saga_id)
        offset = (page - 1) * page_size
        if offset > 2**31:
            details.append(Detail(field="page", reason="out_of_range", message="too far; use cursor"))
        if details:
            raise refused(details)
        found: Page = await self._store.list_sagas(where, limit=page_size, offset=0 if after else offset, after=after)
        return SagaPage(
            sagas=found.sagas,
            total_count=found.total_count,
            page=page,
            page_size=page_size,
            has_next=found.next_cursor is not None,
            next_cursor=write_cursor(found.next_cursor),
        )

    async def cancel(self, saga_id: str, asked_by: Requester = IN_PROCESS, reason: str | None = None) -> Saga:
        """Asks for the cancellation, durably; `reason` is for the audit log. `Conflict`: the saga is terminal.
        `NotFound`. `Invalid`: the reason."""
        if reason is not None:
            details: list[Detail] = []
            # Masked here already: what the audit log has once, it keeps.
            reason = self._payload_mask.text(read_reason(details, "reason", reason))
            if details:
                raise refused(details)
        canonical = canonical_saga_id(saga_id)
        saga = await self._store.request_cancel_unless_terminal(canonical, asked_by, reason) if canonical else None
        if saga is None:
            raise NotFound(f"saga not found: {saga_id}")
        note_saga(saga)
        if saga.status.is_terminal:
            raise Conflict(f"saga {saga.saga_id} is already {saga.status}")
        log.info("cancel_accepted saga_id=%s status=%s principal=%s", saga.saga_id, saga.status, asked_by.principal)
        if not self._supervisor.cancel(saga.saga_id):
            await self._settle_if_waiting(saga)
        return saga

    async def _settle_if_waiting(self, saga: Saga) -> None:
        """A saga that nobody has begun is ended here instead of waiting for its turn in the backlog."""
        if saga.status is SagaStatus.STARTED and saga.owner is None:
            try:
                record = transitions.advance(
                    saga, (await self._definition(saga)).definition, CancelObserved(), self._clock.now()
                )
                note_end(await self._record(record), self._meter, self._tracer)
            except (LeaseLost, NotFound):
                # Claimed meanwhile: the worker that has it sees the request in the row. Or its definition is gone: the
                # request is stored all the same.
                pass
        else:
            self._supervisor.wake()

    async def retry_compensation(
        self, saga_id: str, steps: Mapping[str, Any] | None = None, asked_by: Requester = IN_PROCESS
    ) -> Saga:
        """Runs the failed compensations of an ended saga again; as it is then, already over if all were done by hand.

        `steps`: by the name of the step, what is corrected about its compensation, as the client sent it: `{"input":
        {...}}` is sent in place of the workflow's request, `{"mark_done": true, "reason": "..."}` calls nobody.
        `Conflict`: there is nothing to retry, or another request was first. `Invalid`: corrections that cannot be, all
        of them. `PayloadTooLarge`. `NotFound`.
        """
        saga = await self.saga(saga_id)
        if not (saga.status.is_terminal and saga.undo_failed):
            if saga.status.is_terminal:
                raise Conflict(f"saga {saga.saga_id} has no failed compensation to retry")
            raise Conflict(f"saga {saga.saga_id} is {saga.status}: what failed can be retried when it has ended")
        definition = (await self._definition(saga)).definition
        corrections = read_corrections(steps or {}, definition, saga.undo_failed, self.max_payload_bytes)
        asked = UndoRetryRequested(corrections=corrections)
        record = transitions.advance(saga, definition, asked, self._clock.now())
        audit = retry_entries(saga, record.after, definition, corrections, asked_by, self._payload_mask)
        try:
            # Freed by the same write: the worker that ended it still stands in the row, and runs it no more.
            after = await self._record(msgspec.structs.replace(record, release=True, audit=audit))
        except LeaseLost:
            raise Conflict(f"saga {saga.saga_id} is being changed by another request") from None
        log.info(
            "compensation_retry_accepted saga_id=%s failed=%d corrected=%d marked_done=%d principal=%s",
            saga.saga_id,
            len(saga.undo_failed),
            sum(correction.request is not None for correction in corrections.values()),
            sum(correction.request is None for correction in corrections.values()),
            asked_by.principal,
        )
        if after.status.is_terminal:
            note_end(after, self._meter, self._tracer)
        else:
            self._supervisor.wake()
        return after

    async def _definition(self, saga: Saga) -> Workflow:
        return await self._catalog.version(saga.workflow_name, saga.workflow_version)

    async def _record(self, record: Record) -> Saga:
        recorded = await self._store.record(record)
        if recorded.landed:
            for entry in record.logs:
                self._meter.step_ended(recorded.saga.workflow_name, entry.action, entry.status)
        self._watchers.publish(record.path, recorded.saga)
        return recorded.saga

    async def register_workflow(
        self, text: str | bytes, asked_by: Requester = IN_PROCESS, *, unless_superseded: bool = False
    ) -> RegisteredWorkflow:
        """Registers a definition, durably. `unless_superseded`: not one that is an earlier version already, so that a
        file which is read at each start does not undo what came after it. `WorkflowInvalid`: with every error in it."""
        definition = parse_workflow(text, self.known_services)
        if unless_superseded and (newest := await self._superseding(definition)) is not None:
            return RegisteredWorkflow(workflow=newest, changed=False, superseded=True)
        source = text if isinstance(text, str) else text.decode("utf-8")  # what was parsed is UTF-8
        registered = await self._store.register_workflow(definition, source, asked_by)
        workflow = Workflow(definition=definition, version=registered.version)
        self._catalog.note(workflow)
        if registered.changed and asked_by is not IN_PROCESS:  # who asked in here names the file
            log.info(
                "workflow_registered name=%s version=%d principal=%s",
                *(definition.name, registered.version, asked_by.principal),
            )
        return RegisteredWorkflow(workflow=workflow, changed=registered.changed)

    async def _superseding(self, definition: WorkflowDefinition) -> Workflow | None:
        """The newest version, if the definition is an earlier one."""
        try:
            newest = await self._catalog.newest(definition.name)
        except NotFound:
            return None
        if newest.definition == definition:
            return None
        for version in range(newest.version - 1, 0, -1):
            if (await self._catalog.version(definition.name, version)).definition == definition:
                return newest
        return None

    async def workflows(self) -> Sequence[Workflow]:
        """The newest version of each workflow, by name."""
        return await self._store.workflows()

    async def workflow(self, name: str) -> Workflow:
        """The newest version. `NotFound`."""
        if not name.isprintable():
            # A NUL is no character to the database, so it must not come that far; no workflow has such a name.
            raise NotFound(f"workflow not found: {name!r}")
        return await self._catalog.newest(name)

    async def workflow_of(self, saga: Saga) -> WorkflowDefinition:
        """The definition the saga began with, and runs on."""
        return (await self._definition(saga)).definition

    async def count_open(self) -> dict[SagaStatus, int]:
        """How many sagas are in each non-final state, in the whole store."""
        return await self._store.count_open()

    async def undo_debt(self) -> Sequence[UndoDebt]:
        """What the sagas of each workflow owe, in the whole store."""
        return await self._store.undo_debt()

    async def schema_state(self) -> SchemaState:
        """How the tables stand to this release."""
        return await self._store.schema_state()

    async def check_database(self) -> None:
        """Returns if the store answers; raises `Unavailable`."""
        await self._store.ping()

    @property
    def holds_lease(self) -> bool:
        """Whether this worker may run sagas."""
        return self._supervisor.holds_lease

    @property
    def is_draining(self) -> bool:
        """The worker has been told to stop and takes no new work."""
        return self._supervisor.is_draining


def _digest(request: StartSaga, body: bytes) -> str:
    """Stands for everything the caller asked for, so that key order in the payload does not matter."""
    canonical = msgspec.json.encode(
        [request.workflow_name, request.correlation_id, request.initiated_by, msgspec.json.decode(body)],
        order="deterministic",
    )
    return hashlib.sha256(canonical).hexdigest()


def _context_of(request: StartSaga, saga_id: str) -> TraceContext | None:
    """Where the saga's own span will hang: below the request's span, else below the caller's. None: it is the first of
    its trace, which is named after the saga; so is that of a request whose caller has no trace."""
    context = read_traceparent(request.traceparent)
    if request.span_id is None:
        return context
    if context is None:
        return TraceContext(trace_id=saga_id.replace("-", ""), span_id=request.span_id)
    return msgspec.structs.replace(context, span_id=request.span_id)
