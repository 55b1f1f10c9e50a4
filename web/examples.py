"""Examples for the OpenAPI document: an order, as the sample workflow runs it, and what can go wrong with it.

Requests are values of the very types that are parsed into, answers are made of values of the domain by the code that
makes real ones, and errors are raised by the code that refuses real requests. What the store would make of it (the
entries of the audit log, revisions) and the words of 404, 409 and an absent database are written here by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from saga.access import Permission, Principal, Role, require
from saga.audit import AuditAction, AuditEntry, Door, NewAuditEntry, Requester
from saga.audit_trail import DEFAULT_PAGE_SIZE, AuditPage
from saga.door_limits import Room
from saga.errors import Conflict, MissingToken, NotFound, SagaError, TokenExpired, TokenInvalid, Unavailable
from saga.mapping import rfc3339
from saga.model import Saga, SagaStatus, StepAction, StepLog, StepStatus
from saga.service import SagaDetail, SagaPage
from saga.workflow import Workflow
from saga.workflow_yaml import parse_workflow
from web import schema, views
from web.body import too_large
from web.door import BODY_SLACK_BYTES
from web.exchange import JSON
from web.parsing import parse_body, parse_query

REQUEST_ID = "shop-4711"
_SAGA_ID = "40406ce6-dcf6-48af-bae1-ac96c250e6eb"
_BEGUN = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
_WORKFLOW = "order-fulfillment"
_YAML = f"""\
name: {_WORKFLOW}
steps:
  - name: reserve-inventory
    service: inventory
    method: InventoryService.Reserve
    compensate: InventoryService.Release
  - name: process-payment
    service: payment
    method: PaymentService.Charge
    compensate: PaymentService.Refund
    on_unknown: compensate
"""
_FAULTY_YAML = f"""\
name: {_WORKFLOW}
steps:
  - name: reserve-inventory
    service: inventry
    metod: InventoryService.Reserve
"""
_SERVICES = ("inventory", "payment", "shipping")
_PAYLOAD = {"order_id": "A-1005", "sku": "lamp", "quantity": 1, "amount_cents": 2499, "card": "declined"}
_DECLINED = "FAILED_PRECONDITION: card declined"


def _after(milliseconds: int) -> datetime:
    return _BEGUN + timedelta(milliseconds=milliseconds)


def _log(step_index: int, action: StepAction, status: StepStatus, begun_ms: int, **more: Any) -> StepLog:
    return StepLog(
        id=f"ae503109-5be1-4abc-9fcf-e398a3d7564{begun_ms % 10}",
        saga_id=_SAGA_ID,
        step_index=step_index,
        step_name=_DEFINITION.steps[step_index].name,
        action=action,
        status=status,
        request_payload=_PAYLOAD,
        attempts=1,
        started_at=_after(begun_ms),
        completed_at=_after(begun_ms + 4),
        **more,
    )


_DEFINITION = parse_workflow(_YAML, _SERVICES)
_REGISTERED = Workflow(definition=_DEFINITION, version=1)
_UNDONE = Saga(
    saga_id=_SAGA_ID,
    workflow_name=_WORKFLOW,
    workflow_version=1,
    status=SagaStatus.FAILED,
    payload=_PAYLOAD,
    created_at=_BEGUN,
    updated_at=_after(31),
    current_step=1,
    correlation_id="A-1005",
    initiated_by="shop",
    error_message=f"step process-payment failed: {_DECLINED}",
)
_LOGS = [
    _log(0, StepAction.EXECUTE, StepStatus.SUCCESS, 8, response_payload={"reservation_id": "R-A-1005", "quantity": 1}),
    _log(1, StepAction.EXECUTE, StepStatus.FAILED, 17, error_message=_DECLINED),
    _log(0, StepAction.COMPENSATE, StepStatus.SUCCESS, 23, response_payload={"was_done": True}),
]
_WHY = "the customer called, ticket 4712"
_CANCELLED_BY = AuditEntry(
    number=11,
    created_at=_BEGUN,
    entered=NewAuditEntry(
        action=AuditAction.CANCEL_SAGA,
        asked_by=Requester(
            principal="alice",
            door=Door.REST,
            roles=(Role.OPERATOR.value,),
            address="192.0.2.7",
            request_id=REQUEST_ID,
        ),
        saga_id=_SAGA_ID,
        workflow_name=_WORKFLOW,
        workflow_version=1,
        reason=_WHY,
        before={"status": "RUNNING", "revision": 2},
        after={"status": "RUNNING", "revision": 2, "cancel_requested": True},
    ),
)

_CANCEL = {"as it is": schema.CancelBody(), "with a reason": schema.CancelBody(reason=_WHY)}

REQUESTS: Mapping[str, Mapping[str, msgspec.Struct]] = {
    "startSaga": {
        "an order": schema.StartSagaBody(
            workflow_name=_WORKFLOW, payload=_PAYLOAD, correlation_id="A-1005", initiated_by="shop"
        ),
        "the least": schema.StartSagaBody(workflow_name=_WORKFLOW),
    },
    "cancelSaga": _CANCEL,
    "compensateSaga": _CANCEL,
    "retryCompensation": {
        "as it is": schema.RetryCompensationBody(),
        "another request": schema.RetryCompensationBody(
            steps={"reserve-inventory": {"input": {"order_id": "A-1005"}, "reason": "typo in the order"}}
        ),
        "undone by hand": schema.RetryCompensationBody(
            steps={"reserve-inventory": {"mark_done": True, "reason": "released by hand, ticket 4711"}}
        ),
    },
    "registerWorkflow": {"two steps": schema.RegisterWorkflowBody(workflow_yaml=_YAML)},
}
"""Bodies by operation, each under a few words that say what it is. Fields that have their defaults are left out."""

_CANCELLED = {200: {"cancelled": schema.Done(success=True, message=f"saga {_SAGA_ID} cancelled")}}

REPLIES: Mapping[str, Mapping[int, Mapping[str, msgspec.Struct]]] = {
    "startSaga": {201: {"started": schema.SagaAccepted(saga_id=_SAGA_ID, status=SagaStatus.STARTED)}},
    "listSagas": {
        200: {
            "one saga": views.saga_list_view(
                SagaPage(sagas=(_UNDONE,), total_count=1, page=1, page_size=20, has_next=False, next_cursor=None)
            )
        }
    },
    "getSaga": {200: {"failed and undone": views.saga_detail_view(SagaDetail(saga=_UNDONE, step_logs=_LOGS))}},
    "cancelSaga": _CANCELLED,
    "compensateSaga": _CANCELLED,
    "retryCompensation": {202: {"runs again": schema.SagaAccepted(saga_id=_SAGA_ID, status=SagaStatus.COMPENSATING)}},
    "registerWorkflow": {201: {"the first version": views.workflow_registered(_REGISTERED)}},
    "listWorkflows": {
        200: {"one workflow": schema.WorkflowListView(workflows=[views.workflow_summary(_REGISTERED)])},
    },
    "getWorkflow": {200: {"two steps": views.workflow_view(_REGISTERED)}},
    "listAudit": {
        200: {
            "a cancellation": views.audit_list_view(
                AuditPage(entries=(_CANCELLED_BY,), page_size=DEFAULT_PAGE_SIZE, next_cursor=None)
            )
        }
    },
    "healthz": {200: {"alive": schema.Alive(status="ok")}},
    "readyz": {
        200: {"ready": schema.Readiness(status="healthy", checks={"database": "ok"}, timestamp=rfc3339(_BEGUN))},
        503: {
            "not ready": schema.Readiness(
                status="unhealthy", checks={"database": "unavailable"}, timestamp=rfc3339(_BEGUN)
            )
        },
    },
}
"""Answers by operation and status."""


def _raised(refuse: Callable[..., object], *args: object) -> SagaError:
    try:
        refuse(*args)
    except SagaError as error:
        return error
    raise AssertionError("it is not refused")


ERRORS: Mapping[int, Mapping[str, Exception]] = {
    400: {
        "a body": _raised(parse_body, b'{"workflow": "order-fulfillment", "payload": 1}', JSON, schema.StartSagaBody),
        "a parameter": _raised(parse_query, b"page_size=500&sort=name", schema.ListSagasQuery),
        "a workflow": _raised(parse_workflow, _FAULTY_YAML, _SERVICES),
    },
    401: {
        "no token": MissingToken(),
        "a token that is no good": TokenInvalid("the token is for another audience"),
        "a token that was good": TokenExpired(),
    },
    403: {
        "a role that is too little": _raised(
            require, Principal(subject="bob", roles=frozenset({Role.AUDITOR})), Permission.WRITE_SAGAS
        )
    },
    404: {
        "no such saga": NotFound(f"saga not found: {_SAGA_ID}"),
        "no such workflow": NotFound(f"workflow not found: {_WORKFLOW}"),
    },
    409: {
        "it has ended": Conflict(f"saga {_SAGA_ID} is already COMPLETED"),
        "nothing to retry": Conflict(f"saga {_SAGA_ID} has no failed compensation to retry"),
        "a key that was used": Conflict("idempotency key 'shop-77' was used with another request"),
    },
    413: {"a long body": too_large((1 << 20) + BODY_SLACK_BYTES)},
    500: {"an error of ours": AssertionError()},
    503: {
        "no database": Unavailable("the database cannot be reached"),
        "too much to do": Room(0, "requests").refusal(),
    },
}
"""What is told with each status, by what was wrong."""
