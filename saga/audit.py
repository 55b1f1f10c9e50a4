"""Who asked for which change: values only. A store keeps them, each in the transaction of its change.

An entry says who, from where, what, and in a few words from what to what; payloads are not in it, for it is kept longer
than the sagas and read by people who need not see them. Refusals for want of a permission are entered too, within the
bounds of `saga/denials.py`.
"""

from __future__ import annotations

import enum
from datetime import datetime

import msgspec

from saga.access import Principal
from saga.errors import Detail
from saga.model import Json


class AuditAction(enum.StrEnum):
    """What a client can ask to be changed. MARK_DONE: a compensation is not run again, it was done by hand."""

    START_SAGA = "START_SAGA"
    CANCEL_SAGA = "CANCEL_SAGA"
    RETRY_COMPENSATION = "RETRY_COMPENSATION"
    CORRECT_COMPENSATION = "CORRECT_COMPENSATION"
    MARK_DONE = "MARK_DONE"
    REGISTER_WORKFLOW = "REGISTER_WORKFLOW"


class AuditOutcome(enum.StrEnum):
    """DENIED: the client lacked the permission, nothing was changed."""

    DONE = "DONE"
    DENIED = "DENIED"


class Door(enum.StrEnum):
    """The way a request came. PROCESS: none, this process itself (the files of `saga.workflow_dir`)."""

    REST = "REST"
    GRPC = "GRPC"
    PROCESS = "PROCESS"


class Requester(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks. `roles`: those that mean something here, sorted. `address`: the peer of the connection."""

    principal: str
    door: Door
    roles: tuple[str, ...] = ()
    address: str | None = None
    request_id: str | None = None

    @property
    def is_identified(self) -> bool:
        """A client was told from others: without access control nobody has a role, with it nobody without one may
        change anything."""
        return bool(self.roles)


IN_PROCESS = Requester(principal="server", door=Door.PROCESS)
"""This process itself, which no client has asked."""

MAX_TEXT = 255
"""Characters kept of what a token or a peer says of itself. As wide as the names of sagas."""


def requester(principal: Principal, door: Door, *, address: str | None, request_id: str) -> Requester:
    """Who asks, in words that any database takes."""
    return Requester(
        principal=_kept(principal.subject),
        door=door,
        roles=tuple(sorted(role.value for role in principal.roles)),
        address=None if address is None else _kept(address),
        request_id=request_id,
    )


def _kept(text: str) -> str:
    text = text[:MAX_TEXT]
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


MAX_REASON = 1000
"""Characters in a reason. A guess: some sentences and a link."""


def read_reason(details: list[Detail], field: str, reason: str) -> str:
    """A reason without the space around it; what is wrong with it is added to `details`."""
    if not 1 <= len(reason.strip()) <= MAX_REASON:
        details.append(Detail(field=field, reason="length", message=f"expected 1 to {MAX_REASON} characters"))
    # People write lines and wide spaces; only what no database column holds is refused.
    elif any(character == "\x00" or "\ud800" <= character <= "\udfff" for character in reason):
        message = "expected characters a database can hold"
        details.append(Detail(field=field, reason="characters", message=message))
    return reason.strip()


class NewAuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An entry before the store gives it a number and an instant. `reason`: why, in the requester's words."""

    action: AuditAction
    asked_by: Requester
    outcome: AuditOutcome = AuditOutcome.DONE
    saga_id: str | None = None
    workflow_name: str | None = None
    workflow_version: int | None = None
    step_name: str | None = None
    reason: str | None = None
    before: Json | None = None
    after: Json | None = None


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An entry as it was stored. `number` rises with each, but not with time where many write at once."""

    number: int
    created_at: datetime
    entered: NewAuditEntry


class AuditFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries a list holds; None: any. `created_after` is inclusive, `created_before` exclusive."""

    saga_id: str | None = None
    principal: str | None = None
    action: AuditAction | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


class AuditEntries(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of the audit log, newest first. `next_cursor` continues after it; None: it was the last."""

    entries: tuple[AuditEntry, ...]
    next_cursor: tuple[datetime, int] | None = None
