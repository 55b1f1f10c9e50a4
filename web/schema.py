"""The JSON of the API as types: what is read, what is answered. `openapi.py` shows these same types, `views.py` makes
the answers.

The order of fields is the order in the answers. Texts in `Meta(extra={"expected": …})` are what a client is told when a
value is none of the type.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from saga.audit import MAX_REASON, AuditAction, AuditFilter, AuditOutcome, Door
from saga.audit_trail import DEFAULT_PAGE_SIZE as DEFAULT_AUDIT_PAGE_SIZE
from saga.json_bounds import MAX_DEPTH
from saga.model import SagaStatus, StepAction, StepStatus
from saga.names import MAX_NAME
from saga.paging import MAX_PAGE_SIZE
from saga.request_id import MAX_LENGTH as MAX_REQUEST_ID
from saga.saga_id import PATTERN as SAGA_ID_PATTERN
from saga.service import MAX_WAIT_SECS
from saga.workflow import OnUnknown, RetryPolicy
from saga.workflow_yaml import MAX_YAML_BYTES

Instant = Annotated[
    str,
    Meta(
        examples=["2026-01-02T03:04:05.678Z"],
        extra_json_schema={"format": "date-time"},
    ),
]
Text = Annotated[str, Meta(min_length=1, max_length=MAX_NAME, extra={"expected": f"1 to {MAX_NAME} characters"})]
Moment = Annotated[
    datetime,
    Meta(
        tz=True,
        examples=["2026-01-02T03:04:05Z"],
        extra={"expected": "RFC 3339 date-time with offset, as 2026-01-02T03:04:05Z (a + is written %2B)"},
    ),
]
Json = dict[str, Any]

# The service itself looks at these, for both doors alike; here they are only told.
BOUNDED = Meta(extra_json_schema={"minLength": 1, "maxLength": MAX_NAME})
SagaId = Annotated[
    str,
    Meta(
        examples=["40406ce6-dcf6-48af-bae1-ac96c250e6eb"],
        description="the saga",
        extra_json_schema={"format": "uuid", "pattern": f"^{SAGA_ID_PATTERN}$"},
    ),
]
WorkflowName = Annotated[str, BOUNDED, Meta(examples=["order-fulfillment"], description="the workflow")]
RequestId = Annotated[
    str,
    Meta(
        examples=["shop-4711"],
        description="the id of the request, in its answer and in the log: the `X-Request-Id` sent, or a new one",
    ),
]

PATH_VALUES: Mapping[str, Any] = {
    "saga_id": SagaId,
    "name": Annotated[WorkflowName, Meta(description="the workflow; every character is taken, a / too")],
}
"""The types of what is in paths, by its name there; what is none of them is not found."""


def inlined(type_: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON schema of a type whose fields name no other type."""
    schema: dict[str, Any] = msgspec.json.schema(type_)["$defs"][type_.__name__]
    return schema


# --- what is read -----------------------------------------------------------------------------------------------------


SentRequestId = Annotated[
    str,
    Meta(
        examples=["shop-4711"],
        description=f"the id this request is to be known by; one that is longer than {MAX_REQUEST_ID} characters or not"
        " printable ASCII is replaced",
    ),
]
IdempotencyKey = Annotated[
    str,
    BOUNDED,
    Meta(
        examples=["shop-77"],
        description="the same key with the same body answers with the same saga and `Idempotent-Replayed: true`, with"
        " another body 409; printable characters",
    ),
]
TraceParent = Annotated[
    str,
    Meta(
        examples=["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
        description="W3C trace context: the saga and the calls of its participants are in this trace; one that is"
        " malformed is ignored",
    ),
]
TraceState = Annotated[
    str, Meta(examples=["shop=t61rcWkgMzE"], description="passed on to the participants beside `traceparent`")
]


class StartSagaBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A saga to be started."""

    workflow_name: Annotated[WorkflowName, Meta(description="the workflow to run, in its newest version")]
    payload: Annotated[
        Json,
        Meta(
            description="given to each step, unless its workflow says otherwise; at most `saga.max_payload_bytes`"
            f" (1 MiB), {MAX_DEPTH} levels deep, without U+0000"
        ),
    ] = {}
    correlation_id: Annotated[
        str | None,
        BOUNDED,
        Meta(examples=["A-1005"], description="an id of yours; can be searched for, and is sent to the participants"),
    ] = None
    initiated_by: Annotated[
        str | None,
        BOUNDED,
        Meta(
            examples=["shop"],
            description="who asks; without it the subject of the token, where tokens are asked for",
        ),
    ] = None


class CancelBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a saga is cancelled."""

    reason: (
        Annotated[
            str, Meta(max_length=MAX_REASON, pattern=r"\S", description="why, without U+0000; kept in the audit log")
        ]
        | msgspec.UnsetType
    ) = msgspec.UNSET


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
        Annotated[
            str, Meta(max_length=MAX_REASON, pattern=r"\S", description="why, without U+0000; kept in the step log")
        ]
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

    workflow_yaml: Annotated[str, Meta(description=f"the definition in YAML, at most {MAX_YAML_BYTES // 1024} KiB")]


class ListSagasQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which sagas, and which of their pages."""

    page: Annotated[
        int,
        Meta(ge=1, le=2**31, description="from 1; `cursor` reaches further", extra={"expected": "int >= 1"}),
    ] = 1
    page_size: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_PAGE_SIZE,
            description="sagas on a page",
            extra={"expected": f"int from 1 to {MAX_PAGE_SIZE}"},
        ),
    ] = 20
    workflow_name: Annotated[Text | None, Meta(examples=["order-fulfillment"], description="equal to")] = None
    status: Annotated[
        SagaStatus | None,
        Meta(examples=["RUNNING"], description="equal to", extra={"expected": "one of " + ", ".join(SagaStatus)}),
    ] = None
    correlation_id: Annotated[Text | None, Meta(examples=["A-1005"], description="equal to")] = None
    compensation_failed: Annotated[
        Literal["true", "false"] | None,
        Meta(description="whether an undo has failed for good", extra={"expected": "true or false"}),
    ] = None
    created_after: Annotated[Moment | None, Meta(description="inclusive")] = None
    created_before: Annotated[Moment | None, Meta(description="exclusive")] = None
    cursor: Annotated[
        str | None,
        Meta(
            examples=["1795383544971000_40406ce6-dcf6-48af-bae1-ac96c250e6eb"],
            description="`next_cursor` of the page before; `page` is then only echoed",
        ),
    ] = None


class GetSagaQuery(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait for the saga's end."""

    wait_secs: Annotated[
        float,
        Meta(
            ge=0,
            le=MAX_WAIT_SECS,
            examples=[10],
            description="answer when the saga is terminal or that many seconds are up",
            extra={"expected": f"number from 0 to {MAX_WAIT_SECS:g}"},
        ),
    ] = 0.0


class ListAuditQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries of the audit log."""

    page_size: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_PAGE_SIZE,
            description="entries on a page",
            extra={"expected": f"int from 1 to {MAX_PAGE_SIZE}"},
        ),
    ] = DEFAULT_AUDIT_PAGE_SIZE
    saga_id: Annotated[SagaId | None, Meta(description="equal to; the saga need not be kept any more")] = None
    principal: Annotated[Text | None, Meta(examples=["alice"], description="equal to")] = None
    action: Annotated[
        AuditAction | None,
        Meta(examples=["CANCEL_SAGA"], description="equal to", extra={"expected": "one of " + ", ".join(AuditAction)}),
    ] = None
    created_after: Annotated[Moment | None, Meta(description="inclusive")] = None
    created_before: Annotated[Moment | None, Meta(description="exclusive")] = None
    cursor: Annotated[
        str | None, Meta(examples=["1795383544971000_11"], description="`next_cursor` of the page before")
    ] = None


def audit_filter(query: ListAuditQuery) -> AuditFilter:
    return AuditFilter(
        saga_id=query.saga_id,
        principal=query.principal,
        action=query.action,
        created_after=query.created_after,
        created_before=query.created_before,
    )


class NoQuery(msgspec.Struct, frozen=True):
    """A call without query parameters."""


# --- what is answered -------------------------------------------------------------------------------------------------

Location = Annotated[
    str,
    Meta(
        examples=["/api/v1/sagas/40406ce6-dcf6-48af-bae1-ac96c250e6eb"],
        description="the path of the saga",
        extra_json_schema={"format": "uri-reference"},
    ),
]
IdempotentReplayed = Annotated[
    Literal["true"] | None, Meta(description="the saga is that of an earlier request with this `Idempotency-Key`")
]
RetryAfter = Annotated[int, Meta(ge=0, examples=[1], description="seconds after which to try again")]
Challenge = Annotated[
    str,
    Meta(
        examples=['Bearer realm="saga"'], description="how a token is sent, or what is wrong with this one (RFC 6750)"
    ),
]
Allow = Annotated[str, Meta(examples=["GET, HEAD, OPTIONS"], description="the methods this path has")]


class SagaAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """A saga that has been started, or is to run again."""

    saga_id: SagaId
    status: Annotated[SagaStatus, Meta(description="of a start always STARTED, however far the saga has come since")]


class SagaView(msgspec.Struct, frozen=True, kw_only=True):
    """A saga."""

    saga_id: SagaId
    workflow_name: WorkflowName
    workflow_version: Annotated[int, Meta(ge=1, description="the version it was started on, and keeps")]
    current_step: Annotated[int, Meta(ge=0, description="steps that have succeeded; compensation does not lower it")]
    status: SagaStatus
    payload: Annotated[Json, Meta(description="what it was started with")]
    correlation_id: Annotated[str | None, Meta(description="the id of whoever started it")]
    initiated_by: Annotated[str | None, Meta(description="who started it")]
    error_message: Annotated[str | None, Meta(description="why it did not complete, or why a step waits for a retry")]
    compensation_failed: Annotated[bool, Meta(description="an undo has failed for good")]
    attempt: Annotated[int, Meta(ge=0, description="the attempt running or due, from 1; 0: nothing is to be called")]
    next_attempt_at: Annotated[Instant | None, Meta(description="set while it waits for its next attempt")]
    created_at: Annotated[Instant, Meta(description="when it was started")]
    updated_at: Annotated[Instant, Meta(description="when it last moved")]


class StepLogView(msgspec.Struct, frozen=True, kw_only=True):
    """One finished action of a step."""

    id: Annotated[str, Meta(description="of this entry")]
    saga_id: SagaId
    step_index: Annotated[int, Meta(ge=0, description="the place of the step in its workflow, from 0")]
    step_name: Annotated[str, Meta(description="the step")]
    action: StepAction
    status: StepStatus
    request_payload: Annotated[Json | None, Meta(description="what was sent")]
    response_payload: Annotated[Json | None, Meta(description="what was answered")]
    error_message: Annotated[str | None, Meta(description="the last failure; of what was done by hand, the reason")]
    attempts: Annotated[int, Meta(ge=0, description="calls that were made for it")]
    started_at: Annotated[Instant, Meta(description="when its first attempt began")]
    completed_at: Annotated[Instant | None, Meta(description="when it had ended")]


class SagaDetailView(msgspec.Struct, frozen=True, kw_only=True):
    """A saga and what was done for it, oldest first."""

    saga: SagaView
    step_logs: list[StepLogView]


class Pagination(msgspec.Struct, frozen=True, kw_only=True):
    """Where in the list a page lies."""

    total_count: Annotated[int, Meta(ge=0, description="all that match")]
    page: Annotated[int, Meta(ge=1, description="as asked for")]
    page_size: Annotated[int, Meta(ge=1, le=MAX_PAGE_SIZE, description="as asked for")]
    has_next: Annotated[bool, Meta(description="there are older ones")]
    next_cursor: Annotated[str | None, Meta(description="leads to them; null: there are none")]


class SagaListView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of sagas, newest first."""

    sagas: list[SagaView]
    pagination: Pagination


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for holds from now on."""

    success: bool
    message: Annotated[str, Meta(description="for people")]


class WorkflowRegistered(msgspec.Struct, frozen=True, kw_only=True):
    """The version new sagas of this workflow start on."""

    name: WorkflowName
    version: Annotated[int, Meta(ge=1, description="from 1; the same definition again keeps it")]
    step_count: Annotated[int, Meta(ge=1, description="how many steps it has")]


class WorkflowSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The newest version of a workflow."""

    name: WorkflowName
    version: Annotated[int, Meta(ge=1, description="from 1")]
    step_count: Annotated[int, Meta(ge=1, description="how many steps it has")]
    step_names: Annotated[list[str], Meta(description="in the order they are run")]


class WorkflowListView(msgspec.Struct, frozen=True, kw_only=True):
    """The newest version of every workflow, by name."""

    workflows: list[WorkflowSummary]


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a workflow, defaults filled in."""

    name: Annotated[str, Meta(description="of the step")]
    service: Annotated[str, Meta(description="where to call: a key of `services` in the configuration")]
    method: Annotated[str, Meta(description="what to call")]
    compensate: Annotated[str | None, Meta(description="what undoes it; null: nothing does")]
    timeout_secs: Annotated[float, Meta(description="for one attempt")]
    retry: RetryPolicy
    compensate_retry: RetryPolicy
    on_unknown: OnUnknown
    input: Annotated[Any, Meta(description="how its request is built: a JMESPath expression or a map of them")]
    compensate_input: Annotated[Any, Meta(description="the same of the request that undoes it")]


class WorkflowView(msgspec.Struct, frozen=True, kw_only=True):
    """The newest version of a workflow, whole."""

    name: WorkflowName
    version: Annotated[int, Meta(ge=1, description="from 1")]
    step_count: Annotated[int, Meta(ge=1, description="how many steps it has")]
    step_names: Annotated[list[str], Meta(description="in the order they are run")]
    timeout_secs: Annotated[float | None, Meta(description="for all steps together; null: no bound")]
    steps: list[StepView]


class AuditEntryView(msgspec.Struct, frozen=True, kw_only=True):
    """One change that was asked for, or, DENIED, was not allowed."""

    id: Annotated[str, Meta(description="of this entry")]
    created_at: Annotated[Instant, Meta(description="when it was asked for")]
    action: AuditAction
    outcome: AuditOutcome
    principal: Annotated[str, Meta(description="the subject of the token; anonymous where there is no access control")]
    roles: Annotated[list[str], Meta(description="those of the token that mean something here")]
    door: Annotated[Door, Meta(description="PROCESS: the server itself, for the files of saga.workflow_dir")]
    address: Annotated[str | None, Meta(description="the peer of the connection")]
    request_id: RequestId | None
    saga_id: SagaId | None
    workflow_name: Annotated[str | None, Meta(description="of the saga, or what was registered")]
    workflow_version: Annotated[int | None, Meta(description="the version of that")]
    step_name: Annotated[str | None, Meta(description="of a correction: the step whose compensation it is about")]
    reason: Annotated[str | None, Meta(description="why, in the words of whoever asked")]
    before: Annotated[Json | None, Meta(description="status, revision or version that the change met")]
    after: Annotated[Json | None, Meta(description="and what it made of them")]


class CursorPagination(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rest of a list is."""

    page_size: Annotated[int, Meta(ge=1, le=MAX_PAGE_SIZE, description="as asked for")]
    has_next: Annotated[bool, Meta(description="there are older ones")]
    next_cursor: Annotated[str | None, Meta(description="leads to them; null: there are none")]


class AuditListView(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the audit log, newest first."""

    entries: list[AuditEntryView]
    pagination: CursorPagination


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: Literal["ok"]


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this process should be sent requests."""

    status: Literal["healthy", "degraded", "unhealthy"]
    checks: Annotated[dict[str, str], Meta(description="`ok` or what is wrong, by part")]
    timestamp: Annotated[Instant, Meta(description="when that was found")]
