"""The JSON of the API as types: what is read, what is answered. `openapi.py` shows these same types.

The order of fields is the order in the answers. Texts in `Meta(extra={"expected": …})` are what a client is told when a
value is none of the type.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from saga.audit import AuditAction, AuditEntry, AuditFilter, AuditOutcome, Door
from saga.audit_trail import DEFAULT_PAGE_SIZE as DEFAULT_AUDIT_PAGE_SIZE
from saga.audit_trail import MAX_PAGE_SIZE as MAX_AUDIT_PAGE_SIZE
from saga.audit_trail import AuditPage
from saga.mapping import rfc3339
from saga.model import Saga, SagaStatus, StepAction, StepLog, StepStatus
from saga.saga_id import PATTERN as SAGA_ID_PATTERN
from saga.service import MAX_NAME, MAX_PAGE_SIZE, MAX_WAIT_SECS, SagaDetail, SagaPage
from saga.undo_corrections import MAX_REASON
from saga.workflow import RetryPolicy, Workflow

Instant = Annotated[
    str,
    Meta(
        description="RFC 3339, UTC, milliseconds",
        examples=["2026-01-02T03:04:05.678Z"],
        extra_json_schema={"format": "date-time"},
    ),
]
Text = Annotated[str, Meta(min_length=1, max_length=MAX_NAME, extra={"expected": f"1 to {MAX_NAME} characters"})]
Moment = Annotated[
    datetime,
    Meta(tz=True, extra={"expected": "RFC 3339 date-time with offset, as 2026-01-02T03:04:05Z (a + is written %2B)"}),
]
Json = dict[str, Any]

# The service itself looks at these, for both doors alike; here they are only told.
BOUNDED = Meta(extra_json_schema={"minLength": 1, "maxLength": MAX_NAME})
SagaId = Annotated[str, Meta(extra_json_schema={"format": "uuid", "pattern": f"^{SAGA_ID_PATTERN}$"})]

PATH_VALUES: Mapping[str, Any] = {"saga_id": SagaId, "name": Annotated[str, BOUNDED]}
"""The types of what is in paths, by its name there; what is none of them is not found."""


def inlined(type_: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema of a type whose fields name no other type."""
    schema: dict[str, Any] = msgspec.json.schema(type_)["$defs"][type_.__name__]
    return schema


# --- what is read -----------------------------------------------------------------------------------------------------


IdempotencyKey = Annotated[
    str,
    BOUNDED,
    Meta(
        description="the same key with the same body answers with the same saga and Idempotent-Replayed: true, with"
        " another body 409"
    ),
]
TraceParent = Annotated[
    str, Meta(description="W3C trace context: the saga and the calls of its participants are in this trace")
]
TraceState = Annotated[str, Meta(description="passed on to the participants beside traceparent")]


class StartSagaBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A saga to be started."""

    workflow_name: Annotated[str, BOUNDED, Meta(description="the workflow to run, in its newest version")]
    payload: Annotated[Json, Meta(description="given to each step, unless its workflow says otherwise")] = {}
    correlation_id: Annotated[str | None, BOUNDED, Meta(description="your own id for it; can be searched for")] = None
    initiated_by: Annotated[str | None, BOUNDED, Meta(description="the service or person that asks")] = None


class CompensationCorrection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is corrected about one failed compensation: either `input`, or `mark_done` with a reason."""

    input: (
        Annotated[Json, Meta(description="sent in place of the workflow's request, in this run only")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    mark_done: (
        Annotated[Literal[True], Meta(description="it was undone by hand: nobody is called; needs a reason")]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    reason: (
        Annotated[str, Meta(max_length=MAX_REASON, pattern=r"\S", description="why; kept in the step log")]
        | msgspec.UnsetType
    ) = msgspec.UNSET


class RetryCompensationBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Failed compensations to be run again. Without a body they run as they are."""

    # Taken as it comes: the service alone knows which steps there are, and finds all faults at once.
    steps: Annotated[
        Json,
        Meta(
            description="by the name of the step; steps that are not named run again as they are",
            extra_json_schema={
                "additionalProperties": {
                    **inlined(CompensationCorrection),
                    "oneOf": [
                        {"required": ["input"], "properties": {"mark_done": False}},
                        {"required": ["mark_done", "reason"], "properties": {"input": False}},
                    ],
                }
            },
        ),
    ] = {}


class RegisterWorkflowBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A workflow to be registered."""

    workflow_yaml: Annotated[str, Meta(description="the definition in YAML, at most 256 KiB")]


class ListSagasQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which sagas, and which of their pages."""

    page: Annotated[int, Meta(ge=1, le=2**31, extra={"expected": "int >= 1"})] = 1
    page_size: Annotated[int, Meta(ge=1, le=MAX_PAGE_SIZE, extra={"expected": f"int from 1 to {MAX_PAGE_SIZE}"})] = 20
    workflow_name: Text | None = None
    status: Annotated[SagaStatus | None, Meta(extra={"expected": "one of " + ", ".join(SagaStatus)})] = None
    correlation_id: Text | None = None
    compensation_failed: Annotated[Literal["true", "false"] | None, Meta(extra={"expected": "true or false"})] = None
    created_after: Annotated[Moment | None, Meta(description="inclusive")] = None
    created_before: Annotated[Moment | None, Meta(description="exclusive")] = None
    cursor: Annotated[str | None, Meta(description="next_cursor of the page before; page is then only echoed")] = None


class GetSagaQuery(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait for the saga's end."""

    wait_secs: Annotated[
        float,
        Meta(
            ge=0,
            le=MAX_WAIT_SECS,
            description="answer when the saga is terminal or that many seconds are up",
            extra={"expected": f"number from 0 to {MAX_WAIT_SECS:g}"},
        ),
    ] = 0.0


class ListAuditQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries of the audit log."""

    page_size: Annotated[
        int, Meta(ge=1, le=MAX_AUDIT_PAGE_SIZE, extra={"expected": f"int from 1 to {MAX_AUDIT_PAGE_SIZE}"})
    ] = DEFAULT_AUDIT_PAGE_SIZE
    saga_id: Annotated[SagaId | None, Meta(description="also of a saga that is not kept any more")] = None
    principal: Text | None = None
    action: Annotated[AuditAction | None, Meta(extra={"expected": "one of " + ", ".join(AuditAction)})] = None
    created_after: Annotated[Moment | None, Meta(description="inclusive")] = None
    created_before: Annotated[Moment | None, Meta(description="exclusive")] = None
    cursor: Annotated[str | None, Meta(description="next_cursor of the page before")] = None


class NoQuery(msgspec.Struct, frozen=True):
    """A call without query parameters."""


# --- what is answered -------------------------------------------------------------------------------------------------


class SagaAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """A saga that has been started, or is to run again."""

    saga_id: str
    status: SagaStatus


class SagaView(msgspec.Struct, frozen=True, kw_only=True):
    """A saga."""

    saga_id: str
    workflow_name: str
    workflow_version: int
    current_step: Annotated[int, Meta(description="steps that have succeeded; compensation does not lower it")]
    status: SagaStatus
    payload: Json
    correlation_id: str | None
    initiated_by: str | None
    error_message: str | None
    compensation_failed: bool
    attempt: Annotated[int, Meta(description="the attempt running or due, from 1; 0: nothing is to be called")]
    next_attempt_at: Instant | None
    created_at: Instant
    updated_at: Instant


class StepLogView(msgspec.Struct, frozen=True, kw_only=True):
    """One finished action of a step."""

    id: str
    saga_id: str
    step_index: int
    step_name: str
    action: StepAction
    status: StepStatus
    request_payload: Json | None
    response_payload: Json | None
    error_message: str | None
    attempts: int
    started_at: Instant
    completed_at: Instant | None


class SagaDetailView(msgspec.Struct, frozen=True, kw_only=True):
    """A saga and what was done for it, oldest first."""

    saga: SagaView
    step_logs: list[StepLogView]


class Pagination(msgspec.Struct, frozen=True, kw_only=True):
    """Where in the list a page lies."""

    total_count: int
    page: int
    page_size: int
    has_next: bool
    next_cursor: str | None


class SagaListView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of sagas, newest first."""

    sagas: list[SagaView]
    pagination: Pagination


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for holds from now on."""

    success: bool
    message: str


class WorkflowRegistered(msgspec.Struct, frozen=True, kw_only=True):
    """The version new sagas of this workflow start on."""

    name: str
    version: int
    step_count: int


class WorkflowSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The newest version of a workflow."""

    name: str
    version: int
    step_count: int
    step_names: list[str]


class WorkflowListView(msgspec.Struct, frozen=True, kw_only=True):
    """The newest version of every workflow, by name."""

    workflows: list[WorkflowSummary]


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a workflow, defaults filled in."""

    name: str
    service: str
    method: str
    compensate: str | None
    timeout_secs: float
    retry: RetryPolicy
    compensate_retry: RetryPolicy
    on_unknown: str
    input: Any
    compensate_input: Any


class WorkflowView(msgspec.Struct, frozen=True, kw_only=True):
    """The newest version of a workflow, whole."""

    name: str
    version: int
    step_count: int
    step_names: list[str]
    timeout_secs: float | None
    steps: list[StepView]


class AuditEntryView(msgspec.Struct, frozen=True, kw_only=True):
    """One change that was asked for, or, DENIED, was not allowed."""

    id: str
    created_at: Instant
    action: AuditAction
    outcome: AuditOutcome
    principal: Annotated[str, Meta(description="the subject of the token; anonymous where there is no access control")]
    roles: list[str]
    door: Annotated[Door, Meta(description="PROCESS: the server itself, for the files of saga.workflow_dir")]
    address: Annotated[str | None, Meta(description="the peer of the connection")]
    request_id: str | None
    saga_id: str | None
    workflow_name: str | None
    workflow_version: int | None
    step_name: Annotated[str | None, Meta(description="of a correction: the step whose compensation it is about")]
    reason: str | None
    before: Annotated[Json | None, Meta(description="status, revision or version that the change met")]
    after: Annotated[Json | None, Meta(description="and what it made of them")]


class CursorPagination(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rest of a list is."""

    page_size: int
    has_next: bool
    next_cursor: str | None


class AuditListView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the audit log, newest first."""

    entries: list[AuditEntryView]
    pagination: CursorPagination


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this process should be sent requests; `checks` has `ok` or what is wrong, by part."""

    status: Literal["healthy", "degraded", "unhealthy"]
    checks: dict[str, str]
    timestamp: Instant


def saga_view(saga: Saga) -> SagaView:
    return SagaView(
        saga_id=saga.saga_id,
        workflow_name=saga.workflow_name,
        workflow_version=saga.workflow_version,
        current_step=saga.current_step,
        status=saga.status,
        payload=saga.payload,
        correlation_id=saga.correlation_id,
        initiated_by=saga.initiated_by,
        error_message=saga.error_message,
        compensation_failed=saga.compensation_failed,
        attempt=saga.attempt,
        next_attempt_at=rfc3339(saga.next_attempt_at) if saga.next_attempt_at else None,
        created_at=rfc3339(saga.created_at),
        updated_at=rfc3339(saga.updated_at),
    )


def step_log_view(entry: StepLog) -> StepLogView:
    return StepLogView(
        id=entry.id,
        saga_id=entry.saga_id,
        step_index=entry.step_index,
        step_name=entry.step_name,
        action=entry.action,
        status=entry.status,
        request_payload=entry.request_payload,
        response_payload=entry.response_payload,
        error_message=entry.error_message,
        attempts=entry.attempts,
        started_at=rfc3339(entry.started_at),
        completed_at=rfc3339(entry.completed_at) if entry.completed_at else None,
    )


def saga_detail_view(detail: SagaDetail) -> SagaDetailView:
    return SagaDetailView(saga=saga_view(detail.saga), step_logs=[step_log_view(entry) for entry in detail.step_logs])


def saga_list_view(page: SagaPage) -> SagaListView:
    return SagaListView(
        sagas=[saga_view(saga) for saga in page.sagas],
        pagination=Pagination(
            total_count=page.total_count,
            page=page.page,
            page_size=page.page_size,
            has_next=page.has_next,
            next_cursor=page.next_cursor,
        ),
    )


def audit_filter(query: ListAuditQuery) -> AuditFilter:
    return AuditFilter(
        saga_id=query.saga_id,
        principal=query.principal,
        action=query.action,
        created_after=query.created_after,
        created_before=query.created_before,
    )


def audit_entry_view(entry: AuditEntry) -> AuditEntryView:
    entered = entry.entered
    return AuditEntryView(
        id=str(entry.number),
        created_at=rfc3339(entry.created_at),
        action=entered.action,
        outcome=entered.outcome,
        principal=entered.asked_by.principal,
        roles=list(entered.asked_by.roles),
        door=entered.asked_by.door,
        address=entered.asked_by.address,
        request_id=entered.asked_by.request_id,
        saga_id=entered.saga_id,
        workflow_name=entered.workflow_name,
        workflow_version=entered.workflow_version,
        step_name=entered.step_name,
        reason=entered.reason,
        before=entered.before,
        after=entered.after,
    )


def audit_list_view(page: AuditPage) -> AuditListView:
    return AuditListView(
        entries=[audit_entry_view(entry) for entry in page.entries],
        pagination=CursorPagination(
            page_size=page.page_size, has_next=page.next_cursor is not None, next_cursor=page.next_cursor
        ),
    )


def workflow_summary(workflow: Workflow) -> WorkflowSummary:
    steps = workflow.definition.steps
    return WorkflowSummary(
        name=workflow.definition.name,
        version=workflow.version,
        step_count=len(steps),
        step_names=[step.name for step in steps],
    )


def workflow_view(workflow: Workflow) -> WorkflowView:
    definition = workflow.definition
    return WorkflowView(
        name=definition.name,
        version=workflow.version,
        step_count=len(definition.steps),
        step_names=[step.name for step in definition.steps],
        timeout_secs=definition.timeout_secs,
        steps=[
            StepView(
                name=step.name,
                service=step.service,
                method=step.method,
                compensate=step.compensate,
                timeout_secs=step.timeout_secs,
                retry=step.retry,
                compensate_retry=step.compensate_retry,
                on_unknown=step.on_unknown.value,
                input=step.input,
                compensate_input=step.compensate_input,
            )
            for step in definition.steps
        ],
    )
