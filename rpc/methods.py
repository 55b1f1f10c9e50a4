"""What each gRPC method does, on Trio: parses a request, calls `SagaService`, maps the answer. What a client may ask
for is decided there; messages are `wire.py`.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Literal

import msgspec
import trio
from k1s0.system.common.v1.types_pb2 import PaginationResult
from k1s0.system.saga.v1 import saga_pb2 as pb

from rpc import wire
from rpc.server_errors import ShuttingDown
from saga.access import NOBODY, Principal
from saga.audit import AuditAction, AuditFilter, Door, Requester, requester
from saga.audit_trail import DEFAULT_PAGE_SIZE as AUDIT_PAGE_SIZE
from saga.drain import Drain
from saga.errors import Detail, TokenExpired
from saga.model import SagaStatus
from saga.names import given_once
from saga.ports import SagaFilter
from saga.request_span import RequestSpan
from saga.service import MAX_WAIT_SECS, SagaService, StartSaga, Watch
from saga.uncancelled import uncancelled

DEFAULT_PAGE_SIZE = 20


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """What the metadata of a call says, and the address of its peer."""

    request_id: str
    principal: Principal = NOBODY
    idempotency_keys: list[str]
    """As they came; there may be one."""
    traceparent: str | None
    tracestate: str | None = None
    span: RequestSpan | None = None
    address: str | None = None

    @property
    def asked_by(self) -> Requester:
        """Who asks, for the audit log."""
        return requester(self.principal, Door.GRPC, address=self.address, request_id=self.request_id)


class Methods:
    """The methods by name, but `next_state`: the next message of a watch, None after the last."""

    def __init__(self, service: SagaService, drain: Drain) -> None:
        self._service = service
        self._drain = drain

    async def start_saga(self, request: pb.StartSagaRequest, caller: Caller) -> pb.StartSagaResponse:
        faults: list[Detail] = []
        payload = wire.json_object("payload", request.payload, faults)
        wire.refuse_if_faulty(faults)
        started = await uncancelled(
            self._service.start,
            StartSaga(
                workflow_name=request.workflow_name,
                payload=payload,
                correlation_id=request.correlation_id or None,
                initiated_by=request.initiated_by or None,
                idempotency_key=given_once("Idempotency-Key", caller.idempotency_keys),
                traceparent=caller.traceparent,
                tracestate=caller.tracestate,
                span_id=None if caller.span is None else caller.span.span_id,
            ),
            caller.asked_by,
        )
        if caller.span is not None:
            caller.span.joins(started.saga)
        # A replay is answered as the first request was, however far the saga has come since.
        return pb.StartSagaResponse(
            saga_id=started.saga.saga_id, status=SagaStatus.STARTED.value, replayed=started.replayed
        )

    async def get_saga(self, request: pb.GetSagaRequest, caller: Caller) -> pb.GetSagaResponse:
        wait_secs = request.wait_secs
        if not (math.isfinite(wait_secs) and 0 <= wait_secs <= MAX_WAIT_SECS):
            message = f"expected a number from 0 to {MAX_WAIT_SECS:g}"
            wire.refuse_if_faulty([Detail(field="wait_secs", reason="out_of_range", message=message)])
        with self._drain.ends_early() as stop, trio.move_on_at(caller.principal.ends_at) as expiry:
            detail = await self._service.get(request.saga_id, wait_secs=wait_secs)
        if stop.cancelled_caught or expiry.cancelled_caught:
            detail = await self._service.get(request.saga_id)
        return pb.GetSagaResponse(
            saga=wire.saga_state(detail.saga), step_logs=[wire.step_log(entry) for entry in detail.step_logs]
        )

    async def list_sagas(self, request: pb.ListSagasRequest, caller: Caller) -> pb.ListSagasResponse:
        faults: list[Detail] = []
        where = SagaFilter(
            workflow_name=request.workflow_name or None,
            status=wire.named(SagaStatus, "status", request.status, faults),
            correlation_id=request.correlation_id or None,
            compensation_failed=request.compensation_failed if request.HasField("compensation_failed") else None,
            created_after=_instant(request, "created_after", faults),
            created_before=_instant(request, "created_before", faults),
        )
        wire.refuse_if_faulty(faults)
        page = await self._service.list_sagas(
            where,
            page=request.pagination.page or 1,
            page_size=request.pagination.page_size or DEFAULT_PAGE_SIZE,
            cursor=request.cursor or None,
        )
        return pb.ListSagasResponse(
            sagas=[wire.saga_state(saga) for saga in page.sagas],
            pagination=PaginationResult(
                total_count=page.total_count,
                page=page.page,
                page_size=page.page_size,
                has_next=page.has_next,
                next_cursor=page.next_cursor or "",
            ),
        )

    async def cancel_saga(self, request: pb.CancelSagaRequest, caller: Caller) -> pb.CancelSagaResponse:
        saga = await uncancelled(self._service.cancel, request.saga_id, caller.asked_by, request.reason or None)
        return pb.CancelSagaResponse(success=True, message=f"saga {saga.saga_id} cancelled")

    async def retry_compensation(
        self, request: pb.RetryCompensationRequest, caller: Caller
    ) -> pb.RetryCompensationResponse:
        steps = {name: wire.correction(entry) for name, entry in request.steps.items()}
        saga = await uncancelled(self._service.retry_compensation, request.saga_id, steps, caller.asked_by)
        return pb.RetryCompensationResponse(saga_id=saga.saga_id, status=saga.status.value)

    async def register_workflow(
        self, request: pb.RegisterWorkflowRequest, caller: Caller
    ) -> pb.RegisterWorkflowResponse:
        registered = await uncancelled(self._service.register_workflow, request.workflow_yaml, caller.asked_by)
        workflow = registered.workflow
        return pb.RegisterWorkflowResponse(
            name=workflow.definition.name, step_count=len(workflow.definition.steps), version=workflow.version
        )

    async def list_workflows(self, request: pb.ListWorkflowsRequest, caller: Caller) -> pb.ListWorkflowsResponse:
        return pb.ListWorkflowsResponse(
            workflows=[wire.workflow_summary(workflow) for workflow in await self._service.workflows()]
        )

    async def get_workflow(self, request: pb.GetWorkflowRequest, caller: Caller) -> pb.GetWorkflowResponse:
        workflow = await self._service.workflow(request.name)
        return pb.GetWorkflowResponse(
            workflow=wire.workflow_summary(workflow), definition=wire.workflow_definition(workflow)
        )

    async def list_audit(self, request: pb.ListAuditRequest, caller: Caller) -> pb.ListAuditResponse:
        faults: list[Detail] = []
        where = AuditFilter(
            saga_id=request.saga_id or None,
            principal=request.principal or None,
            action=wire.named(AuditAction, "action", request.action, faults),
            created_after=_instant(request, "created_after", faults),
            created_before=_instant(request, "created_before", faults),
        )
        wire.refuse_if_faulty(faults)
        page = await self._service.audit.entries(
            where, page_size=request.page_size or AUDIT_PAGE_SIZE, cursor=request.cursor or None
        )
        return pb.ListAuditResponse(
            entries=[wire.audit_entry(entry) for entry in page.entries], next_cursor=page.next_cursor or ""
        )

    async def next_state(self, watch: Watch, principal: Principal) -> pb.SagaStateProto | None:
        with self._drain.ends_early() as stop, trio.move_on_at(principal.ends_at) as expiry:
            saga = await watch.next()
        if expiry.cancelled_caught:
            raise TokenExpired
        if stop.cancelled_caught:
            raise ShuttingDown("the server is shutting down; watch again")
        return None if saga is None else wire.saga_state(saga)


def _instant(
    request: pb.ListSagasRequest | pb.ListAuditRequest,
    field: Literal["created_after", "created_before"],
    faults: list[Detail],
) -> datetime | None:
    return wire.instant(field, getattr(request, field), faults) if request.HasField(field) else None
