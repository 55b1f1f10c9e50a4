"""Values of the domain as the answers of the API (`schema.py`)."""

from __future__ import annotations

from saga.audit import AuditEntry
from saga.audit_trail import AuditPage
from saga.mapping import rfc3339
from saga.model import Saga, StepLog
from saga.service import SagaDetail, SagaPage
from saga.workflow import Workflow
from web.schema import (
    AuditEntryView,
    AuditListView,
    CursorPagination,
    Pagination,
    SagaDetailView,
    SagaListView,
    SagaView,
    StepLogView,
    StepView,
    WorkflowRegistered,
    WorkflowSummary,
    WorkflowView,
)


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


def workflow_registered(workflow: Workflow) -> WorkflowRegistered:
    definition = workflow.definition
    return WorkflowRegistered(name=definition.name, version=workflow.version, step_count=len(definition.steps))


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
                on_unknown=step.on_unknown,
                input=step.input,
                compensate_input=step.compensate_input,
            )
            for step in definition.steps
        ],
    )
