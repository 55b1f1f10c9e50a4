"""The audit log as clients see it: pages of it, and the entries of what was denied at a door.

What changes something is entered by the store, with the change (`saga.ports.Store`); nothing here does that.
"""

from __future__ import annotations

import logging
import re

import msgspec
import trio

from saga.audit import AuditAction, AuditEntry, AuditFilter, AuditOutcome, NewAuditEntry, Requester
from saga.denials import Denials
from saga.errors import Detail, RowRejected, Unavailable, refused
from saga.names import check_name
from saga.paging import check_page_size, read_cursor, write_cursor
from saga.ports import Store
from saga.saga_id import canonical_saga_id
from saga.uncancelled import uncancelled

DEFAULT_PAGE_SIZE = 50

log = logging.getLogger("saga.audit")


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of entries, newest first. `next_cursor` leads to older ones; None: there are none."""

    entries: tuple[AuditEntry, ...]
    page_size: int
    next_cursor: str | None


class AuditTrail:
    """All methods but `note_denied` raise `Unavailable` when the store cannot be reached."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._denials = Denials()
        self.denials_lost = 0
        """How many should have been entered, but the store would not."""

    async def entries(
        self, where: AuditFilter, *, page_size: int = DEFAULT_PAGE_SIZE, cursor: str | None = None
    ) -> AuditPage:
        """A page, newest first. `Invalid`: a size, an id or a cursor that cannot be."""
        details: list[Detail] = []
        check_page_size(details, page_size)
        if where.saga_id is not None:
            saga_id = canonical_saga_id(where.saga_id)
            if saga_id is None:
                details.append(Detail(field="saga_id", reason="malformed", message="expected the id of a saga"))
            where = msgspec.structs.replace(where, saga_id=saga_id)
        if where.principal is not None:
            check_name(details, "principal", where.principal)
        after = read_cursor(details, cursor, _entry_number)
        if details:
            raise refused(details)
        found = await self._store.list_audit(where, limit=page_size, after=after)
        return AuditPage(entries=found.entries, page_size=page_size, next_cursor=write_cursor(found.next_cursor))

    async def note_denied(self, asked_by: Requester, action: AuditAction, saga_id: str | None = None) -> None:
        """Enters that `asked_by` lacked the permission, unless that principal has left too many such entries of late.
        Without the store it is only in the log: the request stays denied. A client that leaves meanwhile takes no entry
        with it. `saga_id`: as the request names it."""
        left_out = self._denials.admit(asked_by.principal, trio.current_time())
        if left_out is None:
            return
        entry = NewAuditEntry(
            action=action,
            asked_by=asked_by,
            outcome=AuditOutcome.DENIED,
            saga_id=None if saga_id is None else canonical_saga_id(saga_id),
            after={"left_out": left_out} if left_out else None,
        )
        try:
            await uncancelled(self._store.add_audit_entry, entry)
        except (Unavailable, RowRejected) as error:
            self.denials_lost += 1
            log.warning("denial_not_entered action=%s principal=%s error=%s", action, asked_by.principal, error)


def _entry_number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
