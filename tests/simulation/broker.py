"""A broker and the way to it, and the outbox of the simulated tables, for the product's own relay.

The broker keeps what arrived, by topic and key. The way to it may be down, may break in the middle of a batch so that
nobody knows what arrived, and some messages are refused for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from saga.errors import Unavailable
from store.cloudevents import Message, OutboxEvent
from store.outbox import Acknowledged, Backlog, Bell, BrokerAway, Outcome, Refused, Settled, Unsent
from tests.simulation.tables import Tables

if TYPE_CHECKING:
    from tests.simulation.world import Worker, World

TOPIC = "events"
REFUSED = Refused("the record is too large")


class Broker:
    """What arrived: event ids and types, by topic and key, in order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.arrived: dict[tuple[str, bytes], list[tuple[str, str]]] = {}
        self.away_until = 0.0

    def append(self, message: Message) -> None:
        headers = dict(message.headers)
        one = (headers["ce_id"].decode(), headers["ce_type"].decode())
        self.arrived.setdefault((message.topic, message.key), []).append(one)
        self._world.chance.note("event", message.topic, message.key, one[1])

    def refuses(self, message: Message) -> bool:
        """The same ones each time; a failed compensation more often than others, for it goes to two topics."""
        return dict(message.headers)["ce_id"].endswith((b"07", b"9f") if message.topic == TOPIC else (b"3", b"7"))


class SimulatedPublisher:
    """Keeps `store.outbox.Publisher` for one worker."""

    def __init__(self, world: World, worker: Worker) -> None:
        self._world = world
        self._worker = worker

    async def connect(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._worker.dead or self._is_away():
            raise BrokerAway("connection refused")

    def _is_away(self) -> bool:
        return not self._world.calm and trio.current_time() < self._world.broker.away_until

    async def check(self) -> None:
        await self.connect()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def publish(self, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        """One fate for a batch: it goes well, goes nowhere, or breaks off after some of it."""
        world, dice = self._world, self._world.chance.dice
        await trio.sleep(dice.choice((0.0, 0.005)))
        breaks_at = len(messages)
        if self._worker.dead or self._is_away():
            breaks_at = 0
        elif not world.calm and dice.random() < world.climate.store_trouble * 4:
            world.chance.fault("broker: connection breaks")
            breaks_at = dice.randrange(len(messages) + 1)
        stuck: set[tuple[str, bytes]] = set()
        for place, message in enumerate(messages):
            if place >= breaks_at:
                # The last one before silence may have arrived; a batch that is sent again then has it twice.
                cut = place == breaks_at and not (self._worker.dead or self._is_away())
                if cut and not world.broker.refuses(message) and dice.random() < 0.5:
                    world.chance.faults["broker: acknowledgement lost"] += 1
                    world.broker.append(message)
                outcomes[place] = Unsent("connection lost")
                stuck.add((message.topic, message.key))
            elif world.broker.refuses(message):
                world.chance.faults["broker: message refused for good"] += 1
                outcomes[place] = REFUSED
            else:
                world.broker.append(message)
                outcomes[place] = Acknowledged()
        await trio.lowlevel.checkpoint()


class SimulatedOutbox:
    """Keeps `store.outbox.Outbox` over `Tables`, by way of the worker's own door."""

    def __init__(self, tables: Tables, worker: Worker) -> None:
        self._tables = tables
        self._door = worker.door
        self.bell: Bell = worker.door.bell

    async def take_share(self, relay_id: str, lease_secs: float) -> int:
        return await self._door.exchange("take_share", lambda: self._tables.take_share(relay_id, lease_secs))

    async def keep(self, relay_id: str, lease_secs: float) -> None:
        await self._door.exchange("keep", lambda: self._tables.keep_relay(relay_id, lease_secs), may_give_up=True)

    async def pending(self, relay_id: str, *, limit: int, max_bytes: int) -> list[OutboxEvent]:
        return await self._door.exchange(
            "pending", lambda: self._tables.pending(relay_id, limit, max_bytes), may_give_up=True
        )

    async def settle(self, settled: Settled) -> None:
        await self._door.exchange("settle", lambda: self._tables.settle(settled), may_give_up=True)

    async def backlog(self, relay_id: str) -> Backlog:
        return await self._door.exchange("backlog", lambda: self._tables.backlog(relay_id), may_give_up=True)

    async def leave(self, relay_id: str) -> None:
        if self._door.dead:
            raise Unavailable("dead")
        await self._door.exchange("leave", lambda: self._tables.remove_relay(relay_id), may_give_up=True)
