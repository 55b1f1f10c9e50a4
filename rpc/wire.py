"""Between the values of `saga/` and the messages of `proto/`, both ways."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TypeVar

import msgspec
from k1s0.system.common.v1.types_pb2 import Timestamp
from k1s0.system.saga.v1 import saga_pb2 as pb

from saga.audit import AuditEntry
from saga.errors import Detail, Invalid
from saga.json_bounds import TOO_LARGE, place_of_number_out_of_range
from saga.model import Json, Saga, StepLog
from saga.workflow import Workflow, encode_definition

E = TypeVar("E", bound=StrEnum)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def timestamp(instant: datetime | None) -> Timestamp | None:
    """The instant to the microsecond; None stays unset."""
    if instant is None:
        return None
    since = instant - _EPOCH
    return Timestamp(seconds=since.days * 86400 + since.seconds, nanos=since.microseconds * 1000)


def instant(field: str, value: Timestamp, faults: list[Detail]) -> datetime | None:
    """The instant, or None with one more fault when it is out of range."""
    try:
        if not 0 <= value.nanos < 1_000_000_000:
            raise OverflowError
        return _EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)
    except OverflowError:
        faults.append(Detail(field=field, reason="out_of_range", message="expected an instant from year 1 to 9999"))
        return None


def json_object(field: str, data: bytes, faults: list[Detail]) -> Json:
    """The JSON object in `data`; empty bytes stand for {}. Anything else is one more fault."""
    if not data:
        return {}
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        place = place_of_number_out_of_range(data)
        if place:
            faults.append(Detail(field=f"{field}.{place}", reason="out_of_range", message=TOO_LARGE))
        else:
            faults.append(Detail(field=field, reason="malformed", message=f"expected a JSON object: {error}"))
        return {}
    if not isinstance(value, dict):
        faults.append(Detail(field=field, reason="type", message="expected a JSON object"))
        return {}
    return value


def correction(entry: pb.CompensationCorrection) -> Json:
    """What REST would have been sent for it; bytes that are no JSON object are None, which the service refuses."""
    told: Json = {}
    if entry.HasField("input"):
        faults: list[Detail] = []
        value = json_object("input", entry.input, faults)
        told["input"] = None if faults else value
    if entry.mark_done:
        told["mark_done"] = True
    if entry.reason:
        told["reason"] = entry.reason
    return told


def named(kind: type[E], field: str, value: str, faults: list[Detail]) -> E | None:
    """The member of that name; "" is None. Anything else is one more fault."""
    try:
        return kind(value) if value else None
    except ValueError:
        faults.append(Detail(field=field, reason="unknown_value", message=f"expected one of {', '.join(kind)}"))
        return None


def audit_entry(entry: AuditEntry) -> pb.AuditEntryProto:
    entered = entry.entered
    return pb.AuditEntryProto(
        id=str(entry.number),
        created_at=timestamp(entry.created_at),
        action=entered.action.value,
        outcome=entered.outcome.value,
        principal=entered.asked_by.principal,
        roles=entered.asked_by.roles,
        door=entered.asked_by.door.value,
        address=entered.asked_by.address or "",
        request_id=entered.asked_by.request_id or "",
        saga_id=entered.saga_id or "",
        workflow_name=entered.workflow_name or "",
        workflow_version=entered.workflow_version or 0,
        step_name=entered.step_name or "",
        reason=entered.reason or "",
        before=b"" if entered.before is None else msgspec.json.encode(entered.before),
        after=b"" if entered.after is None else msgspec.json.encode(entered.after),
    )


def saga_state(saga: Saga) -> pb.SagaStateProto:
    return pb.SagaStateProto(
        id=saga.saga_id,
        workflow_name=saga.workflow_name,
        current_step=saga.current_step,
        status=saga.status.value,
        payload=msgspec.json.encode(saga.payload),
        correlation_id=saga.correlation_id or "",
        initiated_by=saga.initiated_by or "",
        error_message=saga.error_message or "",
        created_at=timestamp(saga.created_at),
        updated_at=timestamp(saga.updated_at),
        workflow_version=saga.workflow_version,
        compensation_failed=saga.compensation_failed,
        attempt=saga.attempt,
        next_attempt_at=timestamp(saga.next_attempt_at),
    )


def step_log(entry: StepLog) -> pb.SagaStepLogProto:
    return pb.SagaStepLogProto(
        id=entry.id,
        saga_id=entry.saga_id,
        step_index=entry.step_index,
        step_name=entry.step_name,
        action=entry.action.value,
        status=entry.status.value,
        request_payload=_json_bytes(entry.request_payload),
        response_payload=_json_bytes(entry.response_payload),
        error_message=entry.error_message or "",
        started_at=timestamp(entry.started_at),
        completed_at=timestamp(entry.completed_at),
        attempts=entry.attempts,
    )


def workflow_summary(workflow: Workflow) -> pb.WorkflowSummary:
    steps = workflow.definition.steps
    return pb.WorkflowSummary(
        name=workflow.definition.name,
        step_count=len(steps),
        step_names=[step.name for step in steps],
        version=workflow.version,
    )


def workflow_definition(workflow: Workflow) -> bytes:
    """The whole definition as a JSON object."""
    return encode_definition(workflow.definition).encode()


def refuse_if_faulty(faults: list[Detail]) -> None:
    """Raises `Invalid` with every fault found in a request."""
    if faults:
        raise Invalid("; ".join(f"{fault.field}: {fault.message}" for fault in faults), tuple(faults))


def _json_bytes(value: Json | None) -> bytes:
    return b"" if value is None else msgspec.json.encode(value)
