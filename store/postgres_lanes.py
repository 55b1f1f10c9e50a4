"""Moves and creations on PostgreSQL, gathered in lanes (`group_commit.py`). Each lane has a connection of its own, and
a batch is one statement, one round trip.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any

from bridge import run_aio
from saga.errors import Unavailable
from saga.ports import Created, Record, Recorded
from store import audit_rows, rows
from store.group_commit import Lane
from store.outbox import Bell
from store.postgres_connections import WRITER_SESSION, Connection, Link, fetch, instant
from store.postgres_errors import NothingSent
from store.queries import Dialect, load
from store.rows import CreateRow, MoveRow

MOVE_LANES = 1
"""Lanes for moves, by the saga's id. Measured with two: no more moves a second from 100 callers, 1.4 times as many from
400, for half again the work of this process a move (43 us instead of 28) where batches get half as long. This process
is what runs out first, so one."""

_Q = load(Dialect.POSTGRES)


class PostgresLanes:
    """`creations` and `moves`: the lanes; `links`: their connections. `now` gives the instant a query takes for now,
    None: the database's. `lost_claim_ids`: those of creations that may have made a worker owner although nobody was
    told are put in. `bell` is rung for what is announced, `events` False: nothing is."""

    def __init__(
        self, dsn: str, *, events: bool, now: Callable[[], datetime | None], bell: Bell, lost_claim_ids: set[str]
    ) -> None:
        self._events = events
        self._now = now
        self._bell = bell
        self._lost_claim_ids = lost_claim_ids
        self._creation_link = Link(dsn, WRITER_SESSION)
        move_links = [Link(dsn, WRITER_SESSION) for _ in range(MOVE_LANES)]
        self.links = (self._creation_link, *move_links)
        self.creations: Lane[CreateRow, Created] = Lane(
            self._write_creations, key_of=lambda row: row.new.saga_id, name="creations"
        )
        self.moves: list[Lane[MoveRow, Recorded]] = [
            Lane(self._move_writer(link), key_of=lambda row: row.record.before.saga_id, name="moves")
            for link in move_links
        ]

    async def _write_creations(self, batch: Sequence[CreateRow]) -> Sequence[Created | Exception]:
        # One id a saga, unlike a claim's: a creation can be sent again and be answered by itself.
        claim_ids = {row.new.saga_id: str(uuid.uuid4()) for row in batch if row.new.owner is not None}
        try:
            results = await run_aio(
                self._creation_link.exchange(lambda connection: self._create_all(connection, batch, claim_ids))
            )
        except NothingSent:
            raise
        except Unavailable:
            self._lost_claim_ids.update(claim_ids.values())
            raise
        if self._events:
            self._bell.ring()
        return results

    def _move_writer(
        self, link: Link
    ) -> Callable[[Sequence[MoveRow]], Coroutine[Any, Any, Sequence[Recorded | Exception]]]:
        async def write(batch: Sequence[MoveRow]) -> Sequence[Recorded | Exception]:
            results = await run_aio(link.exchange(lambda connection: self.record_all(connection, batch)))
            if self._events and any(row.record.events for row in batch):
                self._bell.ring()
            return results

        return write

    async def _create_all(
        self, connection: Connection, batch: Sequence[CreateRow], claim_ids: dict[str, str]
    ) -> list[Created | Exception]:
        made: dict[str, datetime] = {}
        results: dict[str, Created | Exception] = {}
        left = list(batch)
        # A row can be refused for one that is gone by the time we look (an operator deletes): then once more.
        while left:
            for row in await self._insert_sagas(connection, left, claim_ids):
                made[str(row["id"])] = row["created_at"]
            refused = [row for row in left if row.new.saga_id not in made]
            left = []
            if refused:
                earlier = await fetch(
                    connection,
                    _Q["sagas_made_earlier"],
                    saga_ids=[row.new.saga_id for row in refused],
                    idempotency_keys=[
                        row.new.idempotency_key for row in refused if row.new.idempotency_key is not None
                    ],
                )
                found = {str(row["id"]): row for row in earlier}
                for row in refused:
                    if row.new.saga_id in found:  # sent before: now its caller is told, and no claim need be
                        self._lost_claim_ids.discard(str(found[row.new.saga_id]["claim_id"]))
                    judged = rows.judge_refused_create(row.new, earlier, instant)
                    if judged is None:
                        left.append(row)
                    else:
                        results[row.new.saga_id] = judged
        for row in batch:
            created_at = made.get(row.new.saga_id)
            if created_at is not None:
                results[row.new.saga_id] = Created(saga=rows.new_saga_as_stored(row.new, created_at))
        return [results[row.new.saga_id] for row in batch]

    async def _insert_sagas(
        self, connection: Connection, batch: list[CreateRow], claim_ids: dict[str, str]
    ) -> list[Any]:
        news = [row.new for row in batch]
        return await fetch(
            connection,
            _Q["create_sagas"],
            saga_ids=[new.saga_id for new in news],
            workflow_names=[new.workflow_name for new in news],
            workflow_versions=[new.workflow_version for new in news],
            payloads=[row.payload for row in batch],
            correlation_ids=[new.correlation_id for new in news],
            initiated_bys=[new.initiated_by for new in news],
            idempotency_keys=[new.idempotency_key for new in news],
            request_digests=[new.request_digest for new in news],
            traceparents=[new.traceparent for new in news],
            tracestates=[new.tracestate for new in news],
            owners=[new.owner for new in news],
            epochs=[rows.first_epoch(new) for new in news],
            claim_ids=[claim_ids.get(new.saga_id) for new in news],
            principals=[new.asked_by.principal for new in news],
            roles=[audit_rows.roles_text(new.asked_by) for new in news],
            addresses=[new.asked_by.address for new in news],
            request_ids=[new.asked_by.request_id for new in news],
            doors=[new.asked_by.door for new in news],
            events=self._events,
            now=self._now(),
        )

    async def record_all(self, connection: Connection, batch: Sequence[MoveRow]) -> list[Recorded | Exception]:
        """What became of each move, in the batch's order; one statement, a second one where any was refused.
        Asyncio-flavoured."""
        saga_ids = [row.record.before.saga_id for row in batch]
        found = await self._write_moves(connection, batch)
        landed = {str(row["id"]): row for row in found}
        refused = [saga_id for saga_id in saga_ids if saga_id not in landed]
        now = {}
        if refused:
            for row in await fetch(connection, _Q["sagas_by_ids"], saga_ids=refused):
                now[str(row["id"])] = rows.saga_from_row(row, instant)
        return [
            rows.moved_saga(row, landed[saga_id], instant)
            if saga_id in landed
            else rows.judge_refused_move(row, now.get(saga_id))
            for saga_id, row in zip(saga_ids, batch, strict=True)
        ]

    async def _write_moves(self, connection: Connection, batch: Sequence[MoveRow]) -> list[Any]:
        """The rows of the moves that landed."""
        records = [row.record for row in batch]
        befores = [record.before for record in records]
        afters = [record.after for record in records]
        return await fetch(
            connection,
            _Q["record_moves"],
            saga_ids=[before.saga_id for before in befores],
            owners_before=[before.owner for before in befores],
            epochs_before=[before.epoch for before in befores],
            revisions_before=[before.revision for before in befores],
            statuses=[after.status for after in afters],
            current_steps=[after.current_step for after in afters],
            error_messages=[after.error_message for after in afters],
            compensations_failed=[after.compensation_failed for after in afters],
            attempts=[after.attempt for after in afters],
            retries_in_secs=[record.retry_in_secs for record in records],
            deadlines_in_secs=[record.deadline_in_secs for record in records],
            outcomes_unknown=[after.outcome_unknown for after in afters],
            undo_plans=[row.undo_plan for row in batch],
            undos_failed=[row.undo_failed for row in batch],
            undos_corrections=[row.undo_corrections for row in batch],
            owners=[row.owner for row in batch],
            epochs=[after.epoch for after in afters],
            **_log_columns(batch),
            **_event_columns(records if self._events else ()),
            now=self._now(),
        )


def _log_columns(batch: Sequence[MoveRow]) -> dict[str, list[Any]]:
    """The step logs of a batch, a list for each column."""
    logs = [
        (row.record.before.saga_id, entry, payloads)
        for row in batch
        for entry, payloads in zip(row.record.logs, row.logs, strict=True)
    ]
    return {
        "log_saga_ids": [saga_id for saga_id, _, _ in logs],
        "log_step_indexes": [entry.step_index for _, entry, _ in logs],
        "log_step_names": [entry.step_name for _, entry, _ in logs],
        "log_actions": [entry.action for _, entry, _ in logs],
        "log_statuses": [entry.status for _, entry, _ in logs],
        "log_request_payloads": [payloads.request_payload for _, _, payloads in logs],
        "log_response_payloads": [payloads.response_payload for _, _, payloads in logs],
        "log_error_messages": [entry.error_message for _, entry, _ in logs],
        "log_started_ats": [entry.started_at for _, entry, _ in logs],
        "log_completed_ats": [entry.completed_at for _, entry, _ in logs],
        "log_attempts": [entry.attempts for _, entry, _ in logs],
    }


def _event_columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The events of moves, a list for each column."""
    events = [(record.before.saga_id, event) for record in records for event in record.events]
    return {
        "event_saga_ids": [saga_id for saga_id, _ in events],
        "event_types": [event.event_type for _, event in events],
        "event_statuses": [event.status for _, event in events],
        "event_current_steps": [event.current_step for _, event in events],
        "event_error_messages": [event.error_message for _, event in events],
    }
