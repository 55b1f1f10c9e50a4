"""Who is told when a saga moves: long polls, WatchSaga, pages.

Only moves made in this process arrive here; `service.Watch` reads the store now and then for those made elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from saga.model import Saga

KEEP = 64
"""States a slow watcher may lag behind; older ones are dropped first, so the last state always arrives. A guess: a
saga of 30 steps makes about as many moves."""


class Subscription:
    """The moves of one saga since the subscription began."""

    def __init__(self) -> None:
        self._moves: deque[Saga] = deque(maxlen=KEEP)
        self._arrived = trio.Event()

    def push(self, path: tuple[Saga, ...]) -> None:
        self._moves.extend(path)
        self._arrived.set()

    def take(self) -> Saga | None:
        """The oldest move not yet taken, or None."""
        return self._moves.popleft() if self._moves else None

    async def wait(self) -> None:
        """Returns when there is a move to take."""
        if not self._moves:
            # No await between the check and the new event, so no move can slip in unseen.
            self._arrived = trio.Event()
            await self._arrived.wait()


class Watchers:
    """Subscriptions by saga; publishing to nobody costs one look-up."""

    def __init__(self) -> None:
        self._by_saga: dict[str, set[Subscription]] = {}

    def publish(self, path: tuple[Saga, ...], stored: Saga) -> None:
        """Tells the watchers of a saga the states it has just passed through, durably. `stored`: the last of them as
        the store has it, with the instants the store has set."""
        if watching := self._by_saga.get(stored.saga_id):
            for subscription in watching:
                subscription.push((*path[:-1], stored))

    @contextmanager
    def subscribe(self, saga_id: str) -> Iterator[Subscription]:
        subscription = Subscription()
        self._by_saga.setdefault(saga_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            watching = self._by_saga[saga_id]
            watching.discard(subscription)
            if not watching:
                del self._by_saga[saga_id]

    def __len__(self) -> int:
        return sum(len(watching) for watching in self._by_saga.values())
