"""The relay: events of the outbox to a broker, in order for each saga, at least once, for as long as it takes.

It reads what is pending, publishes it, and notes what became of it; nothing is held in memory between two passes, so a
broker that is away costs rows in a table and no more. Which part of the outbox is a relay's, and what a message is sent
with, is behind `Outbox` and `Publisher`; this module knows neither SQL nor Kafka.

Order: a pass takes the events of a saga in the order of their ids, without a gap, and sends none of a saga after one
that could not be sent. Two relays can meet in one partition of the outbox only while a lease changes hands; each begins
at the first event that was not noted as published, so that what consumers see first of each `event_id` is in order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, NoReturn, Protocol

import msgspec
import trio

from saga.errors import SagaError, Unavailable
from saga.model import EventType
from saga.payload_mask import NOTHING, PayloadMask
from store.cloudevents import Message, OutboxEvent, message_of

log = logging.getLogger("saga.outbox")

BATCH_EVENTS = 500
"""Events in one pass. From here on more gain little, and all of them would be sent twice after a crash. A guess."""

BATCH_BYTES = 8 * 1024 * 1024
"""Payloads in one pass: what the relay may hold in memory, a few times over. A guess."""

SPACING_SECS = 0.05
"""Passes under load begin this far apart, so that they are not made of single events. The first event after a quiet
moment does not wait."""

POLL_SECS = 1.0
"""How often a quiet outbox is looked at for what other workers have committed. One index scan; a guess."""

PUBLISH_SECS = 30.0
"""How long the broker has for one batch. What it has not acknowledged then is sent again."""

LAST_ANSWER_SECS = 1.0
"""How long a batch under way is waited for when the relay is told to stop. Brokers answer in milliseconds."""

RETRY_SECS = (0.1, 5.0)
"""The first and the longest pause after a pass that failed; doubled each time in between."""

FAREWELL_SECS = 1.0
"""How long the last pass may take: what it does not get through waits in the table."""

STOP_SECS = 5.0
"""How long the database may take to note what is to be noted at the end."""


class Bell:
    """Rung by a store that has committed events; heard by the relay of the same process."""

    def __init__(self) -> None:
        self._rung = trio.Event()

    def ring(self) -> None:
        self._rung.set()

    def silence(self) -> None:
        """What rang until now has been heard."""
        if self._rung.is_set():
            self._rung = trio.Event()

    async def heard(self) -> None:
        """Returns when it has rung since it was silenced."""
        await self._rung.wait()


class DeadMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was refused for good. `id`: the event's in the outbox; `message`: the JSON that was to be sent."""

    id: int
    topic: str
    message: str
    reason: str


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What became of events, by their ids: `published`, or `removed` because they are among the dead. A published event
    has a dead message too if only its copy was refused."""

    published: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    dead: tuple[DeadMessage, ...] = ()


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """What waits in the partitions of a relay: how many (counted up to a bound), and since when the oldest."""

    pending: int = 0
    oldest_secs: float = 0.0


class Outbox(Protocol):
    """The table. Every method raises `Unavailable` when the database cannot be reached."""

    @property
    def bell(self) -> Bell: ...

    async def take_share(self, relay_id: str, lease_secs: float) -> int:
        """Says that the relay is alive for `lease_secs`, frees what dead ones had, and takes or gives up partitions
        until it has its share; how many it has now."""
        ...

    async def keep(self, relay_id: str, lease_secs: float) -> None:
        """Says that the relay is alive, and changes nothing else."""
        ...

    async def pending(self, relay_id: str, *, limit: int, max_bytes: int) -> list[OutboxEvent]:
        """The oldest unpublished events of the relay's partitions, by id: no more than `limit`, and none after the one
        with which their payloads exceed `max_bytes`."""
        ...

    async def settle(self, settled: Settled) -> None:
        """Durable when it returns; the same may be said twice."""
        ...

    async def backlog(self, relay_id: str) -> Backlog: ...

    async def leave(self, relay_id: str) -> None:
        """Frees the relay's partitions at once."""
        ...


class BrokerAway(SagaError):
    """The broker cannot be reached, or does not take anything now. Trying again later can help."""


class Acknowledged(msgspec.Struct, frozen=True):
    """The broker has it, on all replicas that count."""


class Refused(msgspec.Struct, frozen=True):
    """The broker will never take it."""

    reason: str


class Unsent(msgspec.Struct, frozen=True):
    """It may or may not have arrived; to be sent again. `no_topic`: the broker answers, and has no such topic or none
    that this client may write."""

    reason: str
    no_topic: bool = False


Outcome = Acknowledged | Refused | Unsent


class Publisher(Protocol):
    """The way to the broker; for one task at a time."""

    async def connect(self) -> None:
        """Returns when there is a connection. `BrokerAway`."""
        ...

    async def publish(self, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        """Sends the messages; those of one key and topic in their order, and none after one that is `Unsent`.
        `outcomes` has a place for each message, filled as they are known, also of a call that is cancelled. Raises
        nothing for what the broker does."""
        ...

    async def check(self) -> None:
        """Returns if the broker answers now; for another task than the one that publishes. `BrokerAway`."""
        ...

    async def aclose(self) -> None:
        """Gives the connection up, in bounded time."""
        ...


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass did, in events. `unsent`: still pending, the broker did not take them; `reason`: why the first of
    them was not taken. `full`: there is more to be read at once."""

    published: int = 0
    dead: int = 0
    unsent: int = 0
    reason: str = ""
    full: bool = False


class _Copied(NamedTuple):
    """What became of copies for the dead letters: `dead` cannot be sent at all; `waiting`: by saga, why one could not
    be sent now, for which the saga's events wait."""

    dead: list[DeadMessage]
    waiting: dict[str, str]


class Relay:
    """Publishes the share of one worker.

    `published` and `dead` count events and refused messages since the start; `backlog` is what was pending when it was
    last counted; `trouble`: why nothing is published now, None when all is well.
    """

    def __init__(
        self,
        outbox: Outbox,
        publisher: Publisher,
        *,
        relay_id: str,
        topic: str,
        lease_secs: float = 15.0,
        batch_events: int = BATCH_EVENTS,
        batch_bytes: int = BATCH_BYTES,
        payload_mask: PayloadMask = NOTHING,
    ) -> None:
        """`payload_mask`: what of payloads is not published."""
        self._payload_mask = payload_mask
        self._outbox = outbox
        self._publisher = publisher
        self._relay_id = relay_id
        self._topic = topic
        self._lease_secs = lease_secs
        self._batch_events = batch_events
        self._batch_bytes = batch_bytes
        self._share_due_at = -1.0
        # The broker was asked for something and was given up before it answered: it will not be asked at the end.
        self._unanswered = False
        # Acknowledged by the broker, but the database was away when that was to be noted.
        self._unnoted: list[Settled] = []
        self.published = 0
        self.dead = 0
        self.backlog = Backlog()
        self.trouble: str | None = None

    @property
    def dead_letter_topic(self) -> str:
        """Where failed compensations go too."""
        return f"{self._topic}.dlq"

    async def check(self) -> None:
        """For readiness: returns if events go out, as far as can be told. `BrokerAway`."""
        if self.trouble is not None:
            raise BrokerAway(self.trouble)
        await self._publisher.check()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Passes for ever: at once when this process has committed events, else now and then. Cancelled, it makes one
        more, in bounded time, and leaves its partitions to others."""
        task_status.started()
        pause_secs, longest_secs = RETRY_SECS
        longest_secs = min(longest_secs, self._lease_secs / 3)
        try:
            while True:
                began = trio.current_time()
                # Before the pass reads: what rings from now on may be too late for it.
                self._outbox.bell.silence()
                try:
                    done = await self.run_once()
                    self._note_trouble(done.reason if done.unsent else None)
                except (Unavailable, BrokerAway) as error:
                    done = Pass()
                    self._note_trouble(str(error))
                if self.trouble is not None:
                    await trio.sleep(pause_secs)
                    pause_secs = min(pause_secs * 2, longest_secs)
                    continue
                pause_secs = RETRY_SECS[0]
                if done.published or done.dead:
                    if not done.full:
                        await trio.sleep_until(began + SPACING_SECS)
                else:
                    with trio.move_on_at(min(trio.current_time() + POLL_SECS, self._share_due_at)):
                        await self._outbox.bell.heard()
        finally:
            # What fails here is safe: the events wait, the lease ends by itself.
            with suppress(Unavailable, BrokerAway), trio.move_on_after(FAREWELL_SECS, shield=True):
                if self.trouble is None and not self._unanswered:
                    # What this process has committed last need not wait for the next one.
                    await self.run_once()
            with suppress(Unavailable), trio.move_on_after(STOP_SECS, shield=True):
                await self._outbox.leave(self._relay_id)
            with trio.CancelScope(shield=True):
                await self._publisher.aclose()

    async def run_once(self) -> Pass:
        """One pass. `Unavailable`, `BrokerAway`: nothing could be done at all, or not be noted."""
        await self._share_if_due()
        await self._note_what_was_not_noted()
        await self._connect()
        events = await self._pending()
        if not events:
            return Pass()
        # A failed compensation goes to the dead letters first. Were it the other way round, an event whose copy cannot
        # be sent just now would be sent again and again.
        copied = await self._publish_copies(events)
        settled, reasons = await self._publish_events(events, copied)
        self.published += len(settled.published)
        self.dead += len(settled.dead)
        _tell_refused(settled.dead, events)
        return Pass(
            published=len(settled.published),
            dead=len(settled.dead),
            unsent=len(events) - len(settled.published) - len(settled.removed),
            reason=reasons[0] if reasons else "",
            full=len(events) >= self._batch_events,
        )

    async def _share_if_due(self) -> None:
        if trio.current_time() >= self._share_due_at:
            await self._outbox.take_share(self._relay_id, self._lease_secs)
            self._share_due_at = trio.current_time() + self._lease_secs / 3
            self.backlog = await self._outbox.backlog(self._relay_id)

    async def _note_what_was_not_noted(self) -> None:
        while self._unnoted:
            await self._outbox.settle(self._unnoted[0])
            del self._unnoted[0]

    async def _connect(self) -> None:
        self._unanswered = True
        await self._publisher.connect()
        self._unanswered = False

    async def _pending(self) -> list[OutboxEvent]:
        """What is to be published, as it may be shown."""
        events = await self._outbox.pending(self._relay_id, limit=self._batch_events, max_bytes=self._batch_bytes)
        return [_masked(event, self._payload_mask) for event in events] if self._payload_mask else events

    async def _publish_copies(self, events: Sequence[OutboxEvent]) -> _Copied:
        """Failed compensations, to their topic."""
        copies = [event for event in events if event.event_type == EventType.SAGA_COMPENSATION_FAILED]
        messages = [message_of(event, self.dead_letter_topic) for event in copies]
        outcomes = _not_tried(messages)
        await self._publish_messages(messages, outcomes)
        dead: list[DeadMessage] = []
        waiting: dict[str, str] = {}
        for event, message, outcome in zip(copies, messages, outcomes, strict=True):
            if isinstance(outcome, Refused) or (isinstance(outcome, Unsent) and outcome.no_topic):
                # A topic that nobody has made must not keep the event itself from its consumers.
                dead.append(_dead(event, message, outcome.reason))
            elif isinstance(outcome, Unsent):
                waiting.setdefault(event.saga_id, outcome.reason)
        return _Copied(dead, waiting)

    async def _publish_events(self, events: Sequence[OutboxEvent], copied: _Copied) -> tuple[Settled, list[str]]:
        """What became of the events, noted in the outbox, and why some of them still wait."""
        sendable = [event for event in events if event.saga_id not in copied.waiting]
        messages = [message_of(event, self._topic) for event in sendable]
        outcomes = _not_tried(messages)
        try:
            await self._publish_messages(messages, outcomes)
        finally:
            # Also when cancelled: what the broker has should not be sent once more by the next process.
            settled, reasons = _judged(sendable, messages, outcomes, copied)
            if settled.published or settled.removed:
                await self._settle(settled)
        return settled, reasons

    async def _publish_messages(self, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        """Publishes in bounded time, and stays alive meanwhile in the eyes of the other relays. Cancelled, it waits a
        little for the answer: what is cut off in between would be sent again."""
        if not messages:
            return

        async def hurry_when_cancelled(bound: trio.CancelScope) -> None:
            try:
                await trio.sleep_forever()
            finally:
                bound.deadline = min(bound.deadline, trio.current_time() + LAST_ANSWER_SECS)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stay_alive)
            with trio.move_on_after(PUBLISH_SECS, shield=True) as bound:
                nursery.start_soon(hurry_when_cancelled, bound)
                await self._publisher.publish(messages, outcomes)
            self._unanswered = bound.cancelled_caught
            if bound.cancelled_caught:
                for place, outcome in enumerate(outcomes):
                    if isinstance(outcome, Unsent):
                        outcomes[place] = Unsent(f"the broker took longer than {PUBLISH_SECS:g} s")
            nursery.cancel_scope.cancel()

    async def _stay_alive(self) -> None:
        while True:
            await trio.sleep(self._lease_secs / 3)
            try:
                await self._outbox.keep(self._relay_id, self._lease_secs)
                # A broker that says nothing is when somebody wants to know what waits.
                self.backlog = await self._outbox.backlog(self._relay_id)
            except Unavailable:
                pass  # without a lease the next pass finds nothing to read; that is enough

    async def _settle(self, settled: Settled) -> None:
        """Notes what became of events; what cannot be noted now is before anything else is read."""
        self._unnoted.append(settled)
        with trio.move_on_after(STOP_SECS, shield=True) as bound:
            await self._outbox.settle(settled)
            self._unnoted.remove(settled)
        if bound.cancelled_caught:
            raise Unavailable("the database takes too long to note what was published")

    def _note_trouble(self, trouble: str | None) -> None:
        """Logs when it begins and when it is over, not each pass in between."""
        if trouble is not None and self.trouble is None:
            log.warning("relay_stalled reason=%s", trouble)
        elif trouble is None and self.trouble is not None:
            log.info("relay_resumed")
        self.trouble = trouble


def _not_tried(messages: Sequence[Message]) -> list[Outcome]:
    return [Unsent("not tried")] * len(messages)


def _judged(
    events: Sequence[OutboxEvent], messages: Sequence[Message], outcomes: Sequence[Outcome], copied: _Copied
) -> tuple[Settled, list[str]]:
    """What is to be noted, and why the other events still wait."""
    published: list[int] = []
    removed: list[int] = []
    dead = list(copied.dead)
    reasons = list(copied.waiting.values())
    for event, message, outcome in zip(events, messages, outcomes, strict=True):
        if isinstance(outcome, Acknowledged):
            published.append(event.id)
        elif isinstance(outcome, Refused):
            removed.append(event.id)
            dead.append(_dead(event, message, outcome.reason))
        else:
            reasons.append(outcome.reason)
    finished = {*published, *removed}
    # A copy is laid aside with its event: as long as that waits, both are tried again.
    dead = [one for one in dead if one.id in finished]
    return Settled(published=tuple(published), removed=tuple(removed), dead=tuple(dead)), reasons


def _tell_refused(dead: Sequence[DeadMessage], events: Sequence[OutboxEvent]) -> None:
    saga_ids = {event.id: event.saga_id for event in events} if dead else {}
    for one in dead:
        log.error("event_refused id=%d topic=%s reason=%s saga_id=%s", one.id, one.topic, one.reason, saga_ids[one.id])


def _masked(event: OutboxEvent, mask: PayloadMask) -> OutboxEvent:
    return msgspec.structs.replace(
        event,
        payload=mask.json(event.payload),
        error_message=None if event.error_message is None else mask.text(event.error_message),
    )


def _dead(event: OutboxEvent, message: Message, reason: str) -> DeadMessage:
    return DeadMessage(id=event.id, topic=message.topic, message=message.value.decode(), reason=reason)


def fair_share(
    relay_id: str, owners: Sequence[tuple[int, str | None]], relays: int
) -> tuple[Iterable[int], Iterable[int]]:
    """Which partitions a relay is to take and which to give up. `owners`: each partition with its relay; `relays`: how
    many there are, this one included."""
    share = -(-len(owners) // max(relays, 1))
    mine = [partition for partition, relay in owners if relay == relay_id]
    free = [partition for partition, relay in owners if relay is None]
    return free[: max(share - len(mine), 0)], mine[share:]
