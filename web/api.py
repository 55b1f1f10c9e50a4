"""The operations of the JSON API, one method each, and the table that says where they are found.

Each parses a request with `parsing.py`, calls `SagaService` once and shapes the answer with `schema.py`. The table is
what the routes, the OpenAPI document and the metrics' labels are made from.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import trio

from saga.access import Permission, require
from saga.audit import AuditAction, Requester
from saga.drain import Drain
from saga.errors import PermissionDenied
from saga.mapping import rfc3339
from saga.model import SagaStatus
from saga.ports import SagaFilter
from saga.readiness import Readiness
from saga.service import SagaService, StartSaga
from saga.tracing import single_traceparent
from saga.uncancelled import uncancelled
from web import schema, views
from web.errors import envelope, headers_of, status_of
from web.exchange import Reply, Request
from web.parsing import parse_body, parse_query

log = logging.getLogger("saga.web")

BASE = "/api/v1"

DOOR_ERRORS = (400, 413, 500, 503)
"""What any request can be told: it breaks a rule of all requests (`door.py`), its body is too long, there is a mistake
of ours, there is more to do than is taken on."""


class Tag(enum.StrEnum):
    """What an operation is about; the order is that of the document."""

    SAGAS = "sagas"
    WORKFLOWS = "workflows"
    AUDIT = "audit"
    HEALTH = "health"


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the API. `replies` maps a status to the type of its body; `errors` are statuses it may fail with,
    beside `DOOR_ERRORS` and, where a permission is asked for, 401 and 403. `headers` are those it reads,
    `reply_headers` those of its success, with their types. `links`: by operation, what OpenAPI's expressions find for
    its parameters in this one's answer. `audited`: what the audit log calls it; None: it changes nothing."""

    name: str
    tag: Tag
    method: str
    path: str
    summary: str
    description: str = ""
    permission: Permission
    handle: Callable[[Request], Awaitable[Reply]]
    replies: Mapping[int, type]
    query: type[msgspec.Struct] = schema.NoQuery
    body: type[msgspec.Struct] | None = None
    body_required: bool = True
    headers: Mapping[str, Any] = {}
    reply_headers: Mapping[str, Any] = {}
    errors: tuple[int, ...] = ()
    links: Mapping[str, Mapping[str, str]] = {}
    audited: AuditAction | None = None


class Api:
    """What HTTP clients can call."""

    def __init__(self, service: SagaService, drain: Drain, readiness: Readiness) -> None:
        self._service = service
        self._drain = drain
        self._readiness = readiness
        self.operations = self._table()

    def _table(self) -> tuple[Operation, ...]:
        return (
            Operation(
                name="startSaga",
                tag=Tag.SAGAS,
                permission=Permission.WRITE_SAGAS,
                method="POST",
                path=f"{BASE}/sagas",
                summary="Start a saga; it is durable when this answers",
                description="Once answered, the saga is stored and will run. With an `Idempotency-Key` it is safe to"
                " ask again, also after a lost answer or a 503: the saga is started once.",
                handle=self.start_saga,
                body=schema.StartSagaBody,
                headers={
                    "Idempotency-Key": schema.IdempotencyKey,
                    "traceparent": schema.TraceParent,
                    "tracestate": schema.TraceState,
                },
                replies={201: schema.SagaAccepted},
                reply_headers={"Location": schema.Location, "Idempotent-Replayed": schema.IdempotentReplayed},
                links={name: {"saga_id": "$response.body#/saga_id"} for name in ("getSaga", "cancelSaga")},
                errors=(404, 409),
                audited=AuditAction.START_SAGA,
            ),
            Operation(
                name="listSagas",
                tag=Tag.SAGAS,
                permission=Permission.READ_SAGAS,
                method="GET",
                path=f"{BASE}/sagas",
                summary="A page of sagas, newest first",
                description="Go on with `cursor`: unlike `page` it neither repeats nor leaves out a saga when others"
                " are started meanwhile.",
                handle=self.list_sagas,
                query=schema.ListSagasQuery,
                replies={200: schema.SagaListView},
                links={"listSagas": {"cursor": "$response.body#/pagination/next_cursor"}},
            ),
            Operation(
                name="getSaga",
                tag=Tag.SAGAS,
                permission=Permission.READ_SAGAS,
                method="GET",
                path=f"{BASE}/sagas/{{saga_id}}",
                summary="A saga and what was done for it",
                description="With `wait_secs` the answer comes when the saga is COMPLETED, FAILED or CANCELLED, when"
                " the time is up, or when the server stops: look at `status`.",
                handle=self.get_saga,
                query=schema.GetSagaQuery,
                replies={200: schema.SagaDetailView},
                errors=(404,),
            ),
            Operation(
                name="cancelSaga",
                tag=Tag.SAGAS,
                permission=Permission.WRITE_SAGAS,
                method="POST",
                path=f"{BASE}/sagas/{{saga_id}}/cancel",
                summary="Ask for the cancellation, durably: what succeeded is compensated, the saga ends CANCELLED",
                description="The cancel is stored and holds when this answers; the undoing is still to come. 409 when"
                " the saga has ended.",
                handle=self.cancel_saga,
                body=schema.CancelBody,
                body_required=False,
                replies={200: schema.Done},
                links={"getSaga": {"saga_id": "$request.path.saga_id"}},
                errors=(404, 409),
                audited=AuditAction.CANCEL_SAGA,
            ),
            Operation(
                name="compensateSaga",
                tag=Tag.SAGAS,
                permission=Permission.WRITE_SAGAS,
                method="POST",
                path=f"{BASE}/sagas/{{saga_id}}/compensate",
                summary="The same as cancel",
                handle=self.cancel_saga,
                body=schema.CancelBody,
                body_required=False,
                replies={200: schema.Done},
                links={"getSaga": {"saga_id": "$request.path.saga_id"}},
                errors=(404, 409),
                audited=AuditAction.CANCEL_SAGA,
            ),
            Operation(
                name="retryCompensation",
                tag=Tag.SAGAS,
                permission=Permission.WRITE_SAGAS,
                method="POST",
                path=f"{BASE}/sagas/{{saga_id}}/retry-compensation",
                summary="Run the failed compensations of an ended saga again, with what is corrected about them",
                description="Only those that failed are run, with the same idempotency keys and a new set of"
                " attempts. If all that is left is marked as done, the saga is over when this answers. 409"
                " when there is nothing to retry.",
                handle=self.retry_compensation,
                body=schema.RetryCompensationBody,
                body_required=False,
                replies={202: schema.SagaAccepted},
                links={"getSaga": {"saga_id": "$response.body#/saga_id"}},
                errors=(404, 409),
                audited=AuditAction.RETRY_COMPENSATION,
            ),
            Operation(
                name="registerWorkflow",
                tag=Tag.WORKFLOWS,
                permission=Permission.WRITE_WORKFLOWS,
                method="POST",
                path=f"{BASE}/workflows",
                summary="Register a workflow, durably; a changed definition is the next version",
                description="The same definition again changes nothing, one that differs is the next version; sagas"
                " keep the one they began on. A bad one is refused with every error in it, each with line"
                " and column.",
                handle=self.register_workflow,
                body=schema.RegisterWorkflowBody,
                replies={201: schema.WorkflowRegistered},
                links={"getWorkflow": {"name": "$response.body#/name"}},
                audited=AuditAction.REGISTER_WORKFLOW,
            ),
            Operation(
                name="listWorkflows",
                tag=Tag.WORKFLOWS,
                permission=Permission.READ_WORKFLOWS,
                method="GET",
                path=f"{BASE}/workflows",
                summary="The newest version of every workflow",
                handle=self.list_workflows,
                replies={200: schema.WorkflowListView},
            ),
            Operation(
                name="getWorkflow",
                tag=Tag.WORKFLOWS,
                permission=Permission.READ_WORKFLOWS,
                method="GET",
                path=f"{BASE}/workflows/{{name}}",
                summary="The newest version of one workflow, whole",
                handle=self.get_workflow,
                replies={200: schema.WorkflowView},
                errors=(404,),
            ),
            Operation(
                name="listAudit",
                tag=Tag.AUDIT,
                permission=Permission.READ_AUDIT,
                method="GET",
                path=f"{BASE}/audit",
                summary="A page of the audit log: who asked for which change, newest first",
                description="What is entered: every change that was asked for, and every one that was denied for want"
                " of a permission. Never a payload.",
                handle=self.list_audit,
                query=schema.ListAuditQuery,
                replies={200: schema.AuditListView},
                links={"listAudit": {"cursor": "$response.body#/pagination/next_cursor"}},
            ),
            Operation(
                name="healthz",
                tag=Tag.HEALTH,
                permission=Permission.OPEN,
                method="GET",
                path="/healthz",
                summary="The process answers",
                handle=self.healthz,
                replies={200: schema.Alive},
            ),
            Operation(
                name="readyz",
                tag=Tag.HEALTH,
                permission=Permission.OPEN,
                method="GET",
                path="/readyz",
                summary="Whether this process should be sent requests",
                description="`degraded` is ready too, with something to be looked at. What is wrong is one word here;"
                " the log has the rest.",
                handle=self.readyz,
                replies={200: schema.Readiness, 503: schema.Readiness},
            ),
        )

    # --- sagas --------------------------------------------------------------------------------------------------------

    async def start_saga(self, request: Request) -> Reply:
        parse_query(request.query, schema.NoQuery)
        body = parse_body(request.body, request.header("Content-Type"), schema.StartSagaBody)
        started = await uncancelled(
            self._service.start,
            StartSaga(
                workflow_name=body.workflow_name,
                payload=body.payload,
                correlation_id=body.correlation_id,
                initiated_by=body.initiated_by,
                idempotency_key=request.header("Idempotency-Key"),
                traceparent=single_traceparent(request.headers.get("traceparent", ())),
                tracestate=",".join(request.headers.get("tracestate", ())),
                span_id=None if request.span is None else request.span.span_id,
            ),
            request.asked_by,
        )
        if request.span is not None:
            request.span.joins(started.saga)
        saga_id = started.saga.saga_id
        headers = {"Location": f"{BASE}/sagas/{saga_id}"}
        if started.replayed:
            headers["Idempotent-Replayed"] = "true"
        # A replay is answered as the first request was, however far the saga has come since.
        return _json(201, schema.SagaAccepted(saga_id=saga_id, status=SagaStatus.STARTED), headers)

    async def list_sagas(self, request: Request) -> Reply:
        query = parse_query(request.query, schema.ListSagasQuery)
        page = await self._service.list_sagas(
            SagaFilter(
                workflow_name=query.workflow_name,
                status=query.status,
                correlation_id=query.correlation_id,
                compensation_failed=None if query.compensation_failed is None else query.compensation_failed == "true",
                created_after=query.created_after,
                created_before=query.created_before,
            ),
            page=query.page,
            page_size=query.page_size,
            cursor=query.cursor,
        )
        return _json(200, views.saga_list_view(page))

    async def get_saga(self, request: Request) -> Reply:
        query = parse_query(request.query, schema.GetSagaQuery)
        saga_id = request.path_values["saga_id"]
        # Nobody waits longer than their token is good for: they are told what there is, as when their time is up.
        with self._drain.ends_early() as stop, trio.move_on_at(request.principal.ends_at) as expiry:
            detail = await self._service.get(saga_id, wait_secs=query.wait_secs)
        if stop.cancelled_caught or expiry.cancelled_caught:
            detail = await self._service.get(saga_id)
        return _json(200, views.saga_detail_view(detail))

    async def cancel_saga(self, request: Request) -> Reply:
        parse_query(request.query, schema.NoQuery)
        reason = None
        if request.body:
            given = parse_body(request.body, request.header("Content-Type"), schema.CancelBody).reason
            reason = None if given is msgspec.UNSET else given
        saga = await uncancelled(self._service.cancel, request.path_values["saga_id"], request.asked_by, reason)
        return _json(200, schema.Done(success=True, message=f"saga {saga.saga_id} cancelled"))

    async def retry_compensation(self, request: Request) -> Reply:
        parse_query(request.query, schema.NoQuery)
        steps = {}
        if request.body:
            steps = parse_body(request.body, request.header("Content-Type"), schema.RetryCompensationBody).steps
        saga_id = request.path_values["saga_id"]
        saga = await uncancelled(self._service.retry_compensation, saga_id, steps, request.asked_by)
        return _json(202, schema.SagaAccepted(saga_id=saga.saga_id, status=saga.status))

    # --- workflows ----------------------------------------------------------------------------------------------------

    async def register_workflow(self, request: Request) -> Reply:
        parse_query(request.query, schema.NoQuery)
        body = parse_body(request.body, request.header("Content-Type"), schema.RegisterWorkflowBody)
        registered = await uncancelled(self._service.register_workflow, body.workflow_yaml, request.asked_by)
        return _json(201, views.workflow_registered(registered.workflow))

    async def list_workflows(self, request: Request) -> Reply:
        parse_query(request.query, schema.NoQuery)
        workflows = [views.workflow_summary(workflow) for workflow in await self._service.workflows()]
        return _json(200, schema.WorkflowListView(workflows=workflows))

    async def get_workflow(self, request: Request) -> Reply:
        parse_query(request.query, schema.NoQuery)
        view = views.workflow_view(await self._service.workflow(request.path_values["name"]))
        # A set of codes has no order of its own; the same workflow should read the same each time.
        return Reply(status=200, body=msgspec.json.encode(view, order="deterministic"))

    # --- the audit log ------------------------------------------------------------------------------------------------

    async def list_audit(self, request: Request) -> Reply:
        query = parse_query(request.query, schema.ListAuditQuery)
        page = await self._service.audit.entries(
            schema.audit_filter(query), page_size=query.page_size, cursor=query.cursor
        )
        return _json(200, views.audit_list_view(page))

    async def answer(self, operation: Operation, request: Request) -> Reply:
        """What `operation` replies; an error becomes its envelope. Cancelled when the client goes away."""
        try:
            require(request.principal, operation.permission)
            return await operation.handle(request)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client gets the envelope; Cancelled is none of it
            if isinstance(error, PermissionDenied):
                await self.note_denied(operation, request.asked_by, request.path_values.get("saga_id"))
            return error_reply(error, request.request_id)

    async def note_denied(self, operation: Operation, asked_by: Requester, saga_id: str | None) -> None:
        """Enters in the audit log that the permission for a change was lacking."""
        if operation.audited is not None:
            await self._service.audit.note_denied(asked_by, operation.audited, saga_id)

    # --- health -------------------------------------------------------------------------------------------------------

    async def healthz(self, request: Request) -> Reply:
        return _json(200, schema.Alive(status="ok"))

    async def readyz(self, request: Request) -> Reply:
        report = await self._readiness.report()
        body = schema.Readiness(
            status=report.health.value, checks=dict(report.checks), timestamp=rfc3339(datetime.now(UTC))
        )
        return _json(200 if report.is_ready else 503, body)


def error_reply(error: Exception, request_id: str) -> Reply:
    """An error as a reply; our own bugs and an absent store are logged."""
    status, _ = status_of(error)
    if status == 500:
        log.error("http_error request_id=%s", request_id, exc_info=error)
    elif status == 503:
        log.info("http_unavailable request_id=%s error=%s", request_id, error)
    elif status in (401, 403):
        log.info("access_refused request_id=%s reason=%s", request_id, error)
    return Reply(status=status, body=envelope(error, request_id), headers=headers_of(error))


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status=status, body=msgspec.json.encode(value), headers=headers or {})
