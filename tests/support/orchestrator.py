"""A whole orchestrator without its doors: the real service, supervisor and SQLite store in memory, in this process.

    async with orchestrator() as house:
        house.service ...
        house.answers["Payment.Charge"] = [REFUSED]      # one an attempt, the last one for ever
        house.answers["Payment.Charge"] = [HANGS]        # answers when house.let_go is set

Participants are written down as data, by method; one that is not named answers {"ok": true}.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from saga.catalog import Catalog
from saga.drain import Drain
from saga.meter import Meter
from saga.payload_mask import NOTHING, PayloadMask
from saga.ports import Answer, Outcome, StepCall
from saga.runner import Engine
from saga.service import SagaService
from saga.supervisor import Limits, Supervisor
from saga.watchers import Watchers
from store.instants import SystemClock
from store.sqlite import SqliteStore, open_sqlite

REFUSED = Answer(outcome=Outcome.REFUSED, code="FAILED_PRECONDITION", message="card declined")
HANGS = Answer(outcome=Outcome.UNKNOWN, code="CANCELLED", message="let go")

ORDER = """
name: order
steps:
  - name: reserve
    service: inventory
    method: Inventory.Reserve
    compensate: Inventory.Release
    compensate_retry: {max_attempts: 1}
  - name: charge
    service: payment
    method: Payment.Charge
    retry: {max_attempts: 1}
"""
"""Two steps, the first with an undo that is tried once."""


class House:
    """The parts of one orchestrator."""

    def __init__(self, store: SqliteStore, meter: Meter, max_payload_bytes: int, payload_mask: PayloadMask) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.calls: list[StepCall] = []
        self.let_go = trio.Event()
        self.store = store
        self.drain = Drain()
        self.meter = meter
        clock = SystemClock()
        watchers = Watchers()
        catalog = Catalog(store)
        engine = Engine(
            store=store,
            caller=self,
            clock=clock,
            watchers=watchers,
            meter=meter,
            draw=lambda: 0.0,
            park_after_secs=30,
        )
        self.supervisor = Supervisor(engine, catalog, "worker-1", Limits(shutdown_grace_secs=0.1))
        self.service = SagaService(
            store,
            self.supervisor,
            catalog,
            watchers,
            clock,
            services={"inventory", "payment"},
            max_payload_bytes=max_payload_bytes,
            payload_mask=payload_mask,
            meter=meter,
        )

    async def call(self, call: StepCall) -> Answer:
        self.calls.append(call)
        scripted = self.answers.get(call.method)
        if scripted is None:
            return Answer(outcome=Outcome.DONE, response={"ok": True})
        answer = scripted.pop(0) if len(scripted) > 1 else scripted[0]
        if answer is HANGS:
            await self.let_go.wait()
        return answer


@asynccontextmanager
async def orchestrator(
    meter: Meter | None = None, max_payload_bytes: int = 1 << 20, payload_mask: PayloadMask = NOTHING
) -> AsyncIterator[House]:
    """Runs for as long as the block lasts, with the workflow `order` registered."""
    async with open_sqlite(":memory:", events=True) as store, trio.open_nursery() as nursery:
        house = House(store, meter or Meter(), max_payload_bytes, payload_mask)
        await nursery.start(house.supervisor.run)
        await house.service.register_workflow(ORDER)
        try:
            yield house
        finally:
            await house.supervisor.drain()
            nursery.cancel_scope.cancel()
