"""Rows to values and values to rows, for both databases: JSON columns, ids, and what a write needs, made ready.

What a store sends is prepared here, in the task of the caller, so that content no database could take is refused
before it shares a batch with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from saga.errors import Conflict, LeaseLost, RowRejected
from saga.model import Json, Saga, SagaStatus, StepAction, StepLog, StepStatus, UndoCorrection
from saga.ports import Claimed, Created, NewSaga, Page, Record, Recorded, SagaFilter, UndoDebt
from saga.saga_id import canonical_saga_id
from saga.workflow import Workflow, decode_definition
from store.cloudevents import OutboxEvent

Row = Mapping[str, Any]
"""A row by column name: an asyncpg Record or a sqlite3.Row."""


class CreateRow(msgspec.Struct, frozen=True):
    """A `NewSaga` made ready: its payload as JSON text."""

    new: NewSaga
    payload: str


class LogRow(msgspec.Struct, frozen=True):
    """The JSON texts of one `LogEntry`; the rest is read from the entry itself."""

    request_payload: str | None
    response_payload: str | None


class MoveRow(msgspec.Struct, frozen=True):
    """A `Record` made ready: plans and payloads as JSON text, logs in the order of the record."""

    record: Record
    undo_plan: str
    undo_failed: str
    undo_corrections: str | None
    logs: tuple[LogRow, ...]

    @property
    def owner(self) -> str | None:
        """Who owns the saga once this landed."""
        return None if self.record.release else self.record.after.owner


def prepare_create(new: NewSaga) -> CreateRow:
    """`RowRejected`: the id or the payload can be stored nowhere."""
    if canonical_saga_id(new.saga_id) != new.saga_id:
        raise RowRejected(f"saga {new.saga_id!r}: the id is not a lower-case UUID")
    return CreateRow(new, encode_object(new.saga_id, "payload", new.payload))


def prepare_move(record: Record) -> MoveRow:
    """`RowRejected`: a payload can be stored nowhere."""
    saga_id = record.before.saga_id
    return MoveRow(
        record,
        msgspec.json.encode(record.after.undo_plan).decode(),
        msgspec.json.encode(record.after.undo_failed).decode(),
        encode_object(saga_id, "undo_corrections", record.after.undo_corrections)
        if record.after.undo_corrections
        else None,
        tuple(
            LogRow(
                None if log.request_payload is None else encode_object(saga_id, "request", log.request_payload),
                None if log.response_payload is None else encode_object(saga_id, "response", log.response_payload),
            )
            for log in record.logs
        ),
    )


def encode_object(saga_id: str, what: str, value: Mapping[Any, Any]) -> str:
    """JSON text. `RowRejected` for what JSON cannot say: half a surrogate pair, nesting without end, foreign types."""
    try:
        return msgspec.json.encode(value).decode()
    except (UnicodeEncodeError, RecursionError, TypeError, ValueError, OverflowError) as error:
        raise RowRejected(f"saga {saga_id}: {what} cannot be written as JSON: {error}") from error


InstantReader = Callable[[Any], datetime | None]
"""Makes an instant of what the driver gives for one, None of NULL."""


def saga_from_row(row: Row, instant: InstantReader) -> Saga:
    """A row of saga_states. A saga without payload (possible by hand only) has an empty one."""
    created_at, updated_at = instant(row["created_at"]), instant(row["updated_at"])
    assert created_at is not None  # both are NOT NULL; tests/store reads them back on every store
    assert updated_at is not None
    return Saga(
        saga_id=str(row["id"]),
        workflow_name=row["workflow_name"],
        workflow_version=row["workflow_version"],
        status=SagaStatus(row["status"]),
        payload=msgspec.json.decode(row["payload"]) if row["payload"] is not None else {},
        created_at=created_at,
        updated_at=updated_at,
        current_step=row["current_step"],
        correlation_id=row["correlation_id"],
        initiated_by=row["initiated_by"],
        error_message=row["error_message"],
        compensation_failed=bool(row["compensation_failed"]),
        cancel_requested=bool(row["cancel_requested"]),
        attempt=row["attempt"],
        next_attempt_at=instant(row["next_attempt_at"]),
        deadline_at=instant(row["deadline_at"]),
        outcome_unknown=bool(row["outcome_unknown"]),
        undo_plan=tuple(msgspec.json.decode(row["undo_plan"])),
        undo_failed=tuple(msgspec.json.decode(row["undo_failed"])),
        undo_corrections=_corrections(row["undo_corrections"]),
        traceparent=row["traceparent"],
        tracestate=row["tracestate"],
        owner=row["owner"],
        epoch=row["epoch"],
        revision=row["revision"],
    )


def _corrections(text: str | None) -> dict[int, UndoCorrection]:
    return {} if text is None else msgspec.json.decode(text, type=dict[int, UndoCorrection])


def new_saga_as_stored(new: NewSaga, created_at: datetime) -> Saga:
    """What `get` would give right after the creation."""
    return Saga(
        saga_id=new.saga_id,
        workflow_name=new.workflow_name,
        workflow_version=new.workflow_version,
        status=SagaStatus.STARTED,
        payload=new.payload,
        created_at=created_at,
        updated_at=created_at,
        correlation_id=new.correlation_id,
        initiated_by=new.initiated_by,
        traceparent=new.traceparent,
        tracestate=new.tracestate,
        owner=new.owner,
        epoch=first_epoch(new),
    )


def first_epoch(new: NewSaga) -> int:
    """Being born with an owner counts as the first change of hands."""
    return 0 if new.owner is None else 1


def moved_saga(row: MoveRow, landed: Row, instant: InstantReader) -> Recorded:
    """What landed, from the record and the columns only the database knows."""
    updated_at = instant(landed["updated_at"])
    assert updated_at is not None  # NOT NULL, see saga_from_row
    before, after = row.record.before, row.record.after
    saga = msgspec.structs.replace(
        after,
        revision=before.revision + 1,
        owner=row.owner,
        updated_at=updated_at,
        next_attempt_at=instant(landed["next_attempt_at"]),
        deadline_at=instant(landed["deadline_at"]),
        cancel_requested=bool(landed["cancel_requested"]),
        # Written once, at creation; whatever `after` says, the row has what `before` was read from.
        created_at=before.created_at,
        payload=before.payload,
    )
    return Recorded(saga=saga)


def judge_refused_move(row: MoveRow, now: Saga | None) -> Recorded | LeaseLost:
    """Why a move did not land, from the row as it is now.

    The revision is raised by moves alone, and only the owner at an epoch makes them: one revision on, at our epoch,
    with the owner and the state we meant to leave, is this very move, sent before and landed. Not so for a saga that is
    over: nobody runs it, and of several operators who reopen it at once one has won. Everything else we relied on being
    unchanged leaves only the cancel request that bars COMPLETED and FAILED. The rest is a lost race.
    """
    before, after = row.record.before, row.record.after
    if now is None:
        return LeaseLost(before.saga_id)
    one_move_on = (now.owner, now.epoch, now.revision) == (row.owner, after.epoch, before.revision + 1)
    as_we_meant = (now.status, now.current_step, now.attempt, now.undo_plan, now.undo_failed) == (
        *(after.status, after.current_step, after.attempt),
        *(after.undo_plan, after.undo_failed),
    )
    if one_move_on and as_we_meant and not before.status.is_terminal:
        return Recorded(saga=now)
    unchanged_since = (now.owner, now.epoch, now.revision) == (before.owner, before.epoch, before.revision)
    if unchanged_since and after.status in (SagaStatus.COMPLETED, SagaStatus.FAILED) and now.cancel_requested:
        return Recorded(saga=now, landed=False)
    return LeaseLost(before.saga_id)


def judge_refused_create(new: NewSaga, earlier: list[Row], instant: InstantReader) -> Created | Conflict | None:
    """What the rows in its way make of a new saga; None: they are gone again, try once more.

    The same id is this very request, sent before and landed. The same key is an earlier request, with the same body
    (a replay) or another (a conflict).
    """
    for row in earlier:
        if str(row["id"]) == new.saga_id:
            saga = saga_from_row(row, instant)
            same = (saga.workflow_name, saga.payload, row["idempotency_key"], row["request_digest"]) == (
                new.workflow_name,
                new.payload,
                new.idempotency_key,
                new.request_digest,
            )
            return Created(saga=saga) if same else Conflict(f"saga {new.saga_id} exists with other content")
    for row in earlier:
        if new.idempotency_key is not None and row["idempotency_key"] == new.idempotency_key:
            if row["request_digest"] == new.request_digest:
                return Created(saga=saga_from_row(row, instant), replayed=True)
            return Conflict(f"idempotency key {new.idempotency_key!r} was used with another request")
    return None


def claimed_from_row(row: Row, instant: InstantReader) -> Claimed:
    """A row of claim_due_sagas. A step that answered nothing has an empty response."""
    responses: dict[str, Json | None] = msgspec.json.decode(row["responses"]) if row["responses"] is not None else {}
    return Claimed(
        saga=saga_from_row(row, instant),
        due_in_secs=row["due_in_secs"],
        deadline_in_secs=row["deadline_in_secs"],
        responses={step: response or {} for step, response in responses.items()},
    )


def step_log_from_row(row: Row, instant: InstantReader) -> StepLog:
    """A row of saga_step_logs."""
    started_at = instant(row["started_at"])
    assert started_at is not None  # NOT NULL, see saga_from_row
    request, response = row["request_payload"], row["response_payload"]
    return StepLog(
        id=str(row["id"]),
        saga_id=str(row["saga_id"]),
        step_index=row["step_index"],
        step_name=row["step_name"],
        action=StepAction(row["action"]),
        status=StepStatus(row["status"]),
        started_at=started_at,
        completed_at=instant(row["completed_at"]),
        attempts=row["attempts"],
        request_payload=None if request is None else msgspec.json.decode(request),
        response_payload=None if response is None else msgspec.json.decode(response),
        error_message=row["error_message"],
    )


def workflow_from_row(row: Row) -> Workflow:
    """A row of workflow_definitions."""
    return Workflow(definition=decode_definition(row["definition"]), version=row["version"])


def undo_debt_from_row(row: Row) -> UndoDebt:
    """A row of undo_debt."""
    return UndoDebt(
        workflow_name=row["workflow_name"],
        failed=row["failed"],
        pending=row["pending"],
        oldest_secs=row["oldest_secs"],
    )


def event_from_row(row: Row, instant: InstantReader) -> OutboxEvent:
    """A row of pending_events."""
    created_at = instant(row["created_at"])
    assert created_at is not None  # it is NOT NULL
    return OutboxEvent(
        id=row["id"],
        event_id=str(row["event_id"]),
        saga_id=str(row["saga_id"]),
        event_type=row["event_type"],
        status=row["status"],
        current_step=row["current_step"],
        error_message=row["error_message"],
        created_at=created_at,
        workflow_name=row["workflow_name"],
        workflow_version=row["workflow_version"],
        correlation_id=row["correlation_id"],
        initiated_by=row["initiated_by"],
        payload=row["payload"] or "{}",
    )


def filter_parameters(where: SagaFilter) -> dict[str, Any]:
    """The parameters that list_sagas and count_sagas share."""
    return {
        "workflow_name": where.workflow_name,
        "status": None if where.status is None else where.status.value,
        "correlation_id": where.correlation_id,
        "compensation_failed": where.compensation_failed,
        "created_after": where.created_after,
        "created_before": where.created_before,
    }


def page(found: list[Saga], limit: int, total: int) -> Page:
    """A page from `limit + 1` rows asked for: the one too many only tells that there is more."""
    sagas = tuple(found[:limit])
    more = len(found) > limit and bool(sagas)
    return Page(
        sagas=sagas,
        total_count=total,
        next_cursor=(sagas[-1].created_at, sagas[-1].saga_id) if more else None,
    )
