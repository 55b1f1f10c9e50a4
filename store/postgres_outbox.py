"""The outbox on Postgres: partitions by saga id, shared out among the live relays of all workers.

All of it goes over a connection of its own, so that publishing a long backlog holds up neither moves nor leases.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from store.cloudevents import OutboxEvent
from store.outbox import Backlog, Bell, Settled, fair_share
from store.postgres_connections import Connection, Link, fetch, instant
from store.queries import Dialect, load
from store.rows import event_from_row

COUNTED = 10_000
"""Events counted in a partition at most: the count is for people and is taken every few seconds."""

FETCHED = (4, 256)
"""Rows of the first fetch and of any: a row may carry a payload of a mebibyte or more."""

_Q = load(Dialect.POSTGRES)


class PostgresOutbox:
    """Keeps `store.outbox.Outbox`. `now`: the instant queries take for now; None: the database's."""

    def __init__(self, link: Link, now: Callable[[], datetime | None]) -> None:
        self._link = link
        self._now = now
        self.bell = Bell()

    async def take_share(self, relay_id: str, lease_secs: float) -> int:
        async def say(connection: Connection) -> int:
            async with connection.transaction():
                await fetch(connection, _Q["lock_outbox_partitions"])
                await fetch(connection, _Q["keep_relay"], relay_id=relay_id, lease_secs=lease_secs, now=self._now())
                await fetch(connection, _Q["remove_expired_relays"], now=self._now())
                found = await fetch(connection, _Q["outbox_partitions"])
                owners = [(row["id"], row["relay"]) for row in found]
                take, give_up = map(list, fair_share(relay_id, owners, found[0]["relays"]))
                if give_up:
                    await fetch(connection, _Q["give_up_partitions"], relay_id=relay_id, partitions=give_up)
                if take:
                    await fetch(connection, _Q["take_free_partitions"], relay_id=relay_id, partitions=take)
                return sum(1 for _, relay in owners if relay == relay_id) + len(take) - len(give_up)

        return await self._link.write(say)

    async def keep(self, relay_id: str, lease_secs: float) -> None:
        async def say(connection: Connection) -> None:
            await fetch(connection, _Q["keep_relay"], relay_id=relay_id, lease_secs=lease_secs, now=self._now())

        await self._link.write_or_give_up(say)

    async def pending(self, relay_id: str, *, limit: int, max_bytes: int) -> list[OutboxEvent]:
        query = _Q["pending_events"]
        named = {"relay_id": relay_id, "limit": limit}

        async def say(connection: Connection) -> list[OutboxEvent]:
            events: list[OutboxEvent] = []
            fetched_bytes = 0
            async with connection.transaction(readonly=True):
                cursor = await connection.cursor(query.text, *(named[name] for name in query.parameters))
                count = FETCHED[0]
                while fetched_bytes <= max_bytes and (found := await cursor.fetch(count)):
                    for row in found:
                        event = event_from_row(row, instant)
                        events.append(event)
                        fetched_bytes += len(event.payload)
                        if fetched_bytes > max_bytes:
                            break
                    # As many as should fit, going by those there are.
                    mean_bytes = fetched_bytes / len(events) + 1
                    count = max(1, min(FETCHED[1], int((max_bytes - fetched_bytes) / mean_bytes)))
            return events

        return await self._link.write_or_give_up(say)

    async def settle(self, settled: Settled) -> None:
        async def say(connection: Connection) -> None:
            await fetch(
                connection,
                _Q["settle_events"],
                published_ids=list(settled.published),
                removed_ids=list(settled.removed),
                dead_ids=[dead.id for dead in settled.dead],
                dead_topics=[dead.topic for dead in settled.dead],
                dead_messages=[dead.message for dead in settled.dead],
                dead_reasons=[dead.reason for dead in settled.dead],
                now=self._now(),
            )

        await self._link.write_or_give_up(say)

    async def backlog(self, relay_id: str) -> Backlog:
        async def say(connection: Connection) -> Backlog:
            (row,) = await fetch(connection, _Q["outbox_backlog"], relay_id=relay_id, limit=COUNTED, now=self._now())
            return Backlog(pending=row["pending"], oldest_secs=row["oldest_secs"] or 0.0)

        return await self._link.write_or_give_up(say)

    async def leave(self, relay_id: str) -> None:
        async def say(connection: Connection) -> None:
            await fetch(connection, _Q["remove_relay"], relay_id=relay_id)

        await self._link.write_or_give_up(say)
