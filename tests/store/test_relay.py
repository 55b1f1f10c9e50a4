"""The relay over the real embedded store, against brokers written down as data, under virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from saga.model import EventType, SagaStatus
from saga.payload_mask import PayloadMask
from store.cloudevents import Message
from store.outbox import (
    FAREWELL_SECS,
    LAST_ANSWER_SECS,
    POLL_SECS,
    PUBLISH_SECS,
    SPACING_SECS,
    Acknowledged,
    BrokerAway,
    Outcome,
    Refused,
    Relay,
    Unsent,
)
from store.sqlite import SqliteStore, open_sqlite
from tests.store.samples import created, event, move

TOPIC = "events"
Judge = Callable[[Message], Outcome]


class Broker:
    """Answers each message as `judge` says. `away`: cannot be reached; `hangs`: takes the first message of a call and
    then says nothing more; `hangs_anew`: says nothing to who connects after that."""

    def __init__(self) -> None:
        self.judge: Judge = lambda _message: Acknowledged()
        self.away = False
        self.hangs = False
        self.hangs_anew = False
        self.answers_after_secs = 0.0
        self.calls: list[tuple[float, list[Message]]] = []
        self.tried_at: list[float] = []
        self.closed = False
        self._is_connected = False

    async def connect(self) -> None:
        await trio.lowlevel.checkpoint()
        self.tried_at.append(trio.current_time())
        if self.away:
            raise BrokerAway("nobody there")
        if self.hangs_anew and not self._is_connected:
            await trio.sleep_forever()
        self._is_connected = True

    async def publish(self, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append((trio.current_time(), list(messages)))
        await trio.sleep(self.answers_after_secs)
        for place, message in enumerate(messages):
            outcomes[place] = self.judge(message)
            if self.hangs:
                self._is_connected = False
                await trio.sleep_forever()

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.closed = True

    @property
    def sent(self) -> list[Message]:
        return [message for _, messages in self.calls for message in messages]


@asynccontextmanager
async def house() -> AsyncIterator[tuple[SqliteStore, Broker, Relay]]:
    async with open_sqlite(":memory:", events=True) as store:
        broker = Broker()
        yield store, broker, Relay(store.outbox, broker, relay_id="r", topic=TOPIC, batch_events=100)


async def failed_undo(store: SqliteStore) -> str:
    """A saga that has announced its start, an undo that failed, and its end."""
    saga = await created(store)
    events = (
        event(EventType.SAGA_COMPENSATION_FAILED, SagaStatus.COMPENSATING),
        event(EventType.SAGA_FAILED, SagaStatus.FAILED),
    )
    await store.record(move(saga, status=SagaStatus.FAILED, events=events))
    return saga.saga_id


async def pending(store: SqliteStore) -> list[tuple[str, str]]:
    found = await store.outbox.pending("r", limit=1000, max_bytes=1 << 30)
    return [(one.saga_id, one.event_type) for one in found]


def unless_to(topic: str, outcome: Outcome) -> Judge:
    return lambda message: outcome if message.topic == topic else Acknowledged()


async def test_what_was_not_taken_stays_and_what_was_does_not() -> None:
    async with house() as (store, broker, relay):
        first, second = await created(store), await created(store)
        broker.judge = lambda message: Unsent("busy") if message.key == first.saga_id.encode() else Acknowledged()
        done = await relay.run_once()
        assert (done.published, done.unsent, done.reason) == (1, 1, "busy")
        assert await pending(store) == [(first.saga_id, "SAGA_STARTED")]
        assert second.saga_id not in {saga_id for saga_id, _ in await pending(store)}


async def test_fields_that_are_to_be_masked_are_not_published_and_stay_stored() -> None:
    async with open_sqlite(":memory:", events=True) as store:
        broker = Broker()
        mask = PayloadMask(["card", "customer.name"])
        relay = Relay(store.outbox, broker, relay_id="r", topic=TOPIC, payload_mask=mask)
        payload = {"card": "4111", "customer": {"name": "Zoe"}, "name": "x", "big": 2**60}
        saga = await created(store, payload=payload)
        events = (event(EventType.SAGA_COMPENSATION_FAILED, SagaStatus.FAILED, error="bad card=4111"),)
        await store.record(move(saga, status=SagaStatus.FAILED, events=events))
        broker.judge = lambda message: Refused("no") if message.topic != TOPIC else Acknowledged()
        await relay.run_once()
        bodies = [msgspec.json.decode(message.value) for message in broker.sent]
        assert len(bodies) == 3  # the failed undo also goes to the dead letters
        shown = {"card": "***", "customer": {"name": "***"}, "name": "x", "big": 2**60}
        assert [body["payload"] for body in bodies] == [shown] * 3
        assert {body["error_message"] for body in bodies} == {None, "bad card=***"}
        (dead,) = store._writer._connection.execute("SELECT message FROM outbox_dead").fetchall()
        assert "4111" not in dead[0]
        stored = await store.get(saga.saga_id)
        assert stored is not None
        assert stored.payload == payload


async def test_the_copy_of_a_failed_undo_goes_first_and_holds_up_only_its_saga() -> None:
    async with house() as (store, broker, relay):
        saga_id, other = await failed_undo(store), (await created(store)).saga_id
        broker.judge = unless_to(f"{TOPIC}.dlq", Unsent("no leader"))
        done = await relay.run_once()
        assert (done.published, done.unsent, done.reason) == (1, 3, "no leader")
        assert [message.topic for message in broker.sent] == [f"{TOPIC}.dlq", TOPIC]
        assert {found for found, _ in await pending(store)} == {saga_id}
        assert broker.sent[-1].key == other.encode()
        broker.judge = lambda _message: Acknowledged()
        assert (await relay.run_once()).published == 3
        assert await pending(store) == []


@pytest.mark.parametrize("outcome", [Refused("forbidden"), Unsent("no such topic", no_topic=True)])
async def test_a_copy_that_cannot_be_sent_is_laid_aside_and_the_event_itself_goes_out(outcome: Outcome) -> None:
    async with house() as (store, broker, relay):
        await failed_undo(store)
        broker.judge = unless_to(f"{TOPIC}.dlq", outcome)
        done = await relay.run_once()
        assert (done.published, done.dead, done.unsent) == (3, 1, 0)
        (dead,) = store._writer._connection.execute("SELECT topic, reason FROM outbox_dead").fetchall()
        assert dead["topic"] == f"{TOPIC}.dlq"
        assert dead["reason"] in ("forbidden", "no such topic")


async def test_a_missing_topic_of_the_events_themselves_is_waited_for() -> None:
    async with house() as (store, broker, relay):
        await created(store)
        broker.judge = lambda _message: Unsent("no such topic", no_topic=True)
        assert (await relay.run_once()).unsent == 1
        assert len(await pending(store)) == 1
        assert relay.dead == 0


async def test_a_broker_that_says_nothing_is_given_up_in_time_and_what_it_took_is_noted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with house() as (store, broker, relay):
        for _ in range(3):
            await created(store)
        broker.hangs = True
        began = trio.current_time()
        done = await relay.run_once()
        assert trio.current_time() - began == pytest.approx(PUBLISH_SECS)
        assert (done.published, done.unsent) == (1, 2)
        assert len(await pending(store)) == 2


async def test_what_waits_is_counted_while_a_broker_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with house() as (store, broker, relay), trio.open_nursery() as nursery:
        broker.hangs = True
        await nursery.start(relay.run)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            await created(store)
        await trio.sleep(12)  # less than a publish may take, more than two of the relay's signs of life
        assert relay.backlog.pending == 3
        nursery.cancel_scope.cancel()


async def test_a_cancelled_pass_notes_what_was_acknowledged(autojump_clock: trio.testing.MockClock) -> None:
    async with house() as (store, broker, relay):
        for _ in range(3):
            await created(store)
        broker.hangs = True
        began = trio.current_time()
        with trio.move_on_after(1) as scope:
            await relay.run_once()
        assert scope.cancelled_caught
        assert trio.current_time() - began == pytest.approx(1 + LAST_ANSWER_SECS)
        assert len(await pending(store)) == 2


async def test_a_batch_under_way_is_not_cut_off_by_a_stop(autojump_clock: trio.testing.MockClock) -> None:
    async with house() as (store, broker, relay):
        broker.answers_after_secs = LAST_ANSWER_SECS / 2
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            await created(store)
            await trio.testing.wait_all_tasks_blocked()
            assert len(broker.sent) == 1
            nursery.cancel_scope.cancel()
        assert await pending(store) == []
        assert len(broker.sent) == 1


async def test_an_event_after_a_quiet_time_goes_out_at_once_and_a_stream_of_them_in_batches(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with house() as (store, broker, relay), trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        await trio.sleep(100.3)
        began = trio.current_time()
        await created(store)
        await trio.testing.wait_all_tasks_blocked()
        assert [at for at, _ in broker.calls] == [began]
        for _ in range(10):
            await created(store)
        await trio.sleep(SPACING_SECS * 4)
        assert [(at - began, len(messages)) for at, messages in broker.calls] == [
            (0.0, 1),
            (pytest.approx(SPACING_SECS), 10),
        ]
        nursery.cancel_scope.cancel()


async def test_what_other_workers_have_committed_is_found_by_the_poll(autojump_clock: trio.testing.MockClock) -> None:
    async with house() as (store, broker, relay), trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        await trio.sleep(100.3)
        began = trio.current_time()
        await created(store)
        store.outbox.bell.silence()
        await trio.sleep(POLL_SECS)
        assert len(broker.sent) == 1
        assert broker.calls[0][0] - began <= POLL_SECS
        nursery.cancel_scope.cancel()


async def test_a_broker_that_is_away_is_tried_less_and_less_often_and_the_table_is_where_events_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with house() as (store, broker, relay), trio.open_nursery() as nursery:
        broker.away = True
        await nursery.start(relay.run)
        for _ in range(250):
            await created(store)
        await trio.sleep(3600)
        pauses = [later - earlier for earlier, later in zip(broker.tried_at, broker.tried_at[1:], strict=False)]
        assert pauses[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
        assert len(await pending(store)) == 250
        with pytest.raises(BrokerAway):
            await relay.check()
        assert (relay.backlog.pending, relay.published) == (250, 0)
        broker.away = False
        await trio.sleep(10)
        await relay.check()
        assert [len(messages) for _, messages in broker.calls] == [100, 100, 50]
        assert relay.published == 250
        nursery.cancel_scope.cancel()


async def test_a_relay_that_is_told_to_stop_publishes_what_was_committed_before_and_closes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with house() as (store, broker, relay):
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            await created(store)
            await trio.testing.wait_all_tasks_blocked()
            await created(store)
            nursery.cancel_scope.cancel()
        assert await pending(store) == []
        assert len(broker.sent) == 2
        assert broker.closed


@pytest.mark.parametrize("secs_before", [0, 10], ids=["found-out-at-the-stop", "found-out-before"])
async def test_a_broker_that_hangs_holds_up_a_stop_for_two_seconds(
    autojump_clock: trio.testing.MockClock, secs_before: float
) -> None:
    async with house() as (store, broker, relay):
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            await created(store)
            await trio.testing.wait_all_tasks_blocked()
            broker.hangs = broker.hangs_anew = True
            for _ in range(2):
                await created(store)
            await trio.sleep(secs_before)
            nursery.cancel_scope.cancel()
            began = trio.current_time()
        assert trio.current_time() - began <= FAREWELL_SECS + LAST_ANSWER_SECS
        # What it took is noted all the same.
        assert len(await pending(store)) == 1
        assert broker.closed
