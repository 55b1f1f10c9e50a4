"""Reads what an operator corrects about failed compensations, with every fault at once, and says what the audit log is
told of it. Pure.

    {"charge": {"input": {"receipt_id": "r-7"}}, "reserve": {"mark_done": true, "reason": "freed by hand, ticket 4711"}}

Both front doors hand it over as it came, so that a step nobody knows and a value of the wrong type are told together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from saga.audit import AuditAction, NewAuditEntry, Requester, read_reason
from saga.errors import Detail, Invalid, PayloadTooLarge
from saga.json_bounds import encode_within_bounds
from saga.model import Json, Saga, UndoCorrection
from saga.payload_mask import PayloadMask
from saga.workflow import WorkflowDefinition

_KNOWN = ("input", "mark_done", "reason")


def read_corrections(
    steps: Mapping[str, Any], definition: WorkflowDefinition, undo_failed: Collection[int], max_input_bytes: int
) -> dict[int, UndoCorrection]:
    """The corrections by step index. `Invalid`: with every fault, by its path (`steps.charge.input`).
    `PayloadTooLarge`: nothing is wrong but the size of inputs."""
    reader = _Reader(max_input_bytes)
    index_of = {step.name: index for index, step in enumerate(definition.steps)}
    failed = ", ".join(step.name for index, step in enumerate(definition.steps) if index in undo_failed)
    corrections: dict[int, UndoCorrection] = {}
    for name, entry in steps.items():
        path = f"steps.{_shown(name)}"
        index = index_of.get(name)
        if index is None:
            reader.fault(path, "unknown", f"the workflow has no such step; compensations failed of: {failed}")
        elif index not in undo_failed:
            reader.fault(path, "not_failed", f"the compensation of this step has not failed; failed: {failed}")
        correction = reader.correction(path, entry)
        if index is not None:
            corrections[index] = correction
    reader.refuse_if_faulty()
    return corrections


class _Reader:
    """Collects faults; what it returns is of use only if there are none."""

    def __init__(self, max_input_bytes: int) -> None:
        self._max_input_bytes = max_input_bytes
        self._faults: list[Detail] = []
        self._too_large: list[Detail] = []

    def fault(self, path: str, reason: str, message: str) -> None:
        self._faults.append(Detail(field=path, reason=reason, message=message))

    def correction(self, path: str, entry: object) -> UndoCorrection:
        if not isinstance(entry, dict):
            self.fault(path, "type", "expected a JSON object with input, or with mark_done and reason")
            return UndoCorrection()
        for key in sorted(entry.keys() - set(_KNOWN)):
            self.fault(f"{path}.{_shown(key)}", "unknown", f"unknown field; known: {', '.join(_KNOWN)}")
        if "input" in entry and "mark_done" in entry:
            self.fault(path, "both", "expected input or mark_done, got both")
        elif "input" not in entry and "mark_done" not in entry:
            self.fault(path, "required", "expected input or mark_done, got neither")
        request = self._input(f"{path}.input", entry["input"]) if "input" in entry else None
        if "mark_done" in entry and entry["mark_done"] is not True:
            self.fault(f"{path}.mark_done", "type", "expected true")
        reason = None
        if "reason" in entry:
            reason = self._reason(f"{path}.reason", entry["reason"])
        elif "mark_done" in entry:
            self.fault(f"{path}.reason", "required", "mark_done needs a reason")
        return UndoCorrection(request=request, reason=reason)

    def _input(self, path: str, value: object) -> Json:
        if not isinstance(value, dict):
            self.fault(path, "type", "expected a JSON object")
            return {}
        try:
            encode_within_bounds(path, value, self._max_input_bytes, self._faults)
        except PayloadTooLarge as error:
            self._too_large += error.details
        except Invalid as error:
            self._faults += error.details
        return value

    def _reason(self, path: str, value: object) -> str:
        if not isinstance(value, str):
            self.fault(path, "type", "expected a string")
            return ""
        return read_reason(self._faults, path, value)

    def refuse_if_faulty(self) -> None:
        if faults := (*self._faults, *self._too_large):
            told = "; ".join(f"{fault.field}: {fault.message}" for fault in faults[:10])
            raise (Invalid if self._faults else PayloadTooLarge)(told, faults)


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) <= 255 else "?"


def retry_entries(
    before: Saga,
    after: Saga,
    definition: WorkflowDefinition,
    corrections: Mapping[int, UndoCorrection],
    asked_by: Requester,
    payload_mask: PayloadMask,
) -> tuple[NewAuditEntry, ...]:
    """What the audit log is told of a retry: the retry, and each correction that came with it."""

    def entry(action: AuditAction, **more: Any) -> NewAuditEntry:
        return NewAuditEntry(
            action=action,
            asked_by=asked_by,
            saga_id=before.saga_id,
            workflow_name=before.workflow_name,
            workflow_version=before.workflow_version,
            **more,
        )

    def corrected(index: int, correction: UndoCorrection) -> NewAuditEntry:
        if correction.request is None:
            action, undo = AuditAction.MARK_DONE, "MARKED_DONE"
        else:
            action, undo = AuditAction.CORRECT_COMPENSATION, "CORRECTED"
        return entry(
            action,
            step_name=definition.steps[index].name,
            # Masked here already: what the audit log has once, it keeps.
            reason=None if correction.reason is None else payload_mask.text(correction.reason),
            before={"undo": "FAILED"},
            after={"undo": undo},
        )

    failed = [definition.steps[index].name for index in before.undo_failed]
    retried = entry(
        AuditAction.RETRY_COMPENSATION,
        before={"status": before.status.value, "revision": before.revision, "undo_failed": failed},
        after={"status": after.status.value, "revision": before.revision + 1},
    )
    return (retried, *(corrected(index, one) for index, one in sorted(corrections.items())))
