"""Removes sagas that ended long ago, and old entries of the audit log where that is asked for, a few at a time, so that
the store does not grow for ever.

Each worker runs these loops; that only one at a time removes sagas is the store's promise. They stay out of the
engine's way: a batch is small, after a full one they rest four times as long as that took, and what fails waits for the
next sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio

from saga.errors import Unavailable
from saga.meter import Meter
from saga.ports import Store

log = logging.getLogger("saga.retention")

DAY_SECS = 86_400.0

BATCH = 100
"""Sagas removed by one write. Measured with six logs and four events each: 9 ms on PostgreSQL, 37 ms on SQLite, where
every other writer waits for it; about what a full batch of moves takes."""

REST = 4.0
"""How many times as long as a full batch took the loop rests before the next: at most a fifth of the database's time,
however slow it is. With the above some 1,000 sagas a second."""

SHORTEST_REST_SECS = 0.02
"""For a clock that saw no time pass. A guess."""

SWEEP_SECS = 60.0
"""How often it is looked for more when there was no full batch. Nobody waits for it; one probe of an index."""


class Retention:
    """`retention_days`: how long a saga is kept after its end; above 0."""

    def __init__(self, store: Store, meter: Meter, retention_days: float) -> None:
        self._store = store
        self._meter = meter
        self._age_secs = retention_days * DAY_SECS

    async def run(self) -> None:
        """Runs until it is cancelled."""
        await _sweep(self.run_once)

    async def run_once(self) -> int:
        """Removes one batch; returns how many sagas. `Unavailable`: perhaps none, perhaps all of it."""
        removed = await self._store.remove_ended_before(self._age_secs, BATCH)
        if removed:
            self._meter.sagas_removed(removed)
            log.info("sagas_removed count=%d", removed)
        return removed


class AuditRetention:
    """`retention_days`: how long an entry of the audit log is kept; above 0."""

    def __init__(self, store: Store, retention_days: float) -> None:
        self._store = store
        self._age_secs = retention_days * DAY_SECS

    async def run(self) -> None:
        """Runs until it is cancelled."""
        await _sweep(self.run_once)

    async def run_once(self) -> int:
        """Removes one batch; returns how many entries. `Unavailable`: perhaps none, perhaps all of it."""
        removed = await self._store.remove_audit_before(self._age_secs, BATCH)
        if removed:
            log.info("audit_entries_removed count=%d", removed)
        return removed


async def _sweep(run_once: Callable[[], Awaitable[int]]) -> NoReturn:
    while True:
        began = trio.current_time()
        try:
            removed = await run_once()
        except Unavailable as error:
            log.warning("retention_failed error=%s", error)
            removed = 0
        except Exception:
            # Housekeeping that fails (a role that may not delete, say) must not take a worker's sagas with it.
            log.exception("retention_failed")
            removed = 0
        if removed == BATCH:
            await trio.sleep(max(SHORTEST_REST_SECS, (trio.current_time() - began) * REST))
        else:
            await trio.sleep(SWEEP_SECS)
