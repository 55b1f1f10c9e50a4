"""From the outbox to a consumer, over Kafka's protocol: real stores, the real publisher, another library's consumer."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
import trio

from bridge import open_loop
from saga.errors import Unavailable
from saga.model import EventType, Saga, SagaStatus
from store.kafka import KafkaPublisher, KafkaSettings
from store.outbox import BrokerAway, Outbox, Relay, Settled
from store.postgres import PostgresStore, open_postgres
from store.sqlite import SqliteStore, open_sqlite
from tests.kafka.conftest import AnyBroker
from tests.store.samples import StandingClock, created, event, move, new_saga
from tests.support.kafka import (
    MESSAGE_TOO_LARGE,
    PRODUCE,
    TOPIC_AUTHORIZATION_FAILED,
    MockBroker,
    Received,
    first_of_each,
    reader,
)

UNKNOWN_SERVER_ERROR = -1
RUNNING, COMPLETED = SagaStatus.RUNNING, SagaStatus.COMPLETED

AnyStore = PostgresStore | SqliteStore


@asynccontextmanager
async def memory_store(clock: StandingClock | None = None) -> AsyncIterator[SqliteStore]:
    async with open_loop(), open_sqlite(":memory:", events=True, clock=clock) as store:
        yield store


@asynccontextmanager
async def relay_of(
    store: AnyStore, broker: AnyBroker, topic: str, *, outbox: Outbox | None = None, lease_secs: float = 15.0
) -> AsyncIterator[Relay]:
    """A relay that does not run by itself yet."""
    publisher = KafkaPublisher(KafkaSettings(brokers=(broker.bootstrap,)), client_id="test")
    relay = Relay(outbox or store.outbox, publisher, relay_id=uuid.uuid4().hex, topic=topic, lease_secs=lease_secs)
    try:
        yield relay
    finally:
        with trio.CancelScope(shield=True):
            await publisher.aclose()


async def step(store: AnyStore, saga: Saga, number: int) -> Saga:
    """The next move of a saga, announced; what it announces says its number."""
    record = move(saga, status=RUNNING, current_step=number, events=(event(EventType.SAGA_RUNNING, RUNNING, number),))
    return (await store.record(record)).saga


async def several_moves(store: AnyStore, moves: int, **changes: str) -> str:
    saga = await created(store, **changes)
    for number in range(1, moves + 1):
        saga = await step(store, saga, number)
    return saga.saga_id


def check_order(received: list[Received], sagas: dict[str, int]) -> None:
    """Every event of each saga once (a second one of the same id is passed over), in the order it happened."""
    steps = defaultdict(list)
    for one in first_of_each(received):
        assert one.key == one.value["saga_id"]
        steps[one.key].append(one.value["current_step"])
    assert steps == {saga_id: list(range(moves + 1)) for saga_id, moves in sagas.items()}
    partitions = defaultdict(set)
    for one in received:
        partitions[one.key].add(one.partition)
    assert {len(found) for found in partitions.values()} == {1}


async def test_a_message_has_all_fields_and_headers_for_every_type_of_event(broker: AnyBroker) -> None:
    topic, clock = broker.topic(), StandingClock()
    types = [one for one in EventType if one is not EventType.SAGA_STARTED]
    async with memory_store(clock) as store, relay_of(store, broker, topic) as relay:
        saga = await created(
            store,
            payload={"order": 7, "name": "Zoë 注文"},
            correlation_id="c-1",
            initiated_by="web",
            workflow_version=3,
        )
        events = tuple(
            event(event_type, SagaStatus.COMPENSATING, number, f"error {number}")
            for number, event_type in enumerate(types, start=1)
        )
        await store.record(move(saga, status=SagaStatus.COMPENSATING, events=events))
        other = await created(store, payload={})
        done = await relay.run_once()
        assert (done.published, done.dead, done.unsent) == (len(EventType) + 1, 0, 0)
        assert (await relay.run_once()).published == 0
    with reader(broker, topic, f"{topic}.dlq") as read:
        received = await trio.to_thread.run_sync(read.until, len(EventType) + 2)

    of_saga = [one for one in received if one.topic == topic and one.key == saga.saga_id]
    assert [one.event_type for one in of_saga] == [EventType.SAGA_STARTED, *types]
    for number, one in enumerate(of_saga):
        assert list(one.value) == [
            *("event_id", "event_type", "saga_id", "workflow_name", "workflow_version", "status", "current_step"),
            *("correlation_id", "initiated_by", "payload", "error_message", "timestamp"),
        ]
        assert one.value == {
            "event_id": str(uuid.UUID(one.event_id)),
            "event_type": EventType.SAGA_STARTED if number == 0 else types[number - 1],
            "saga_id": saga.saga_id,
            "workflow_name": "order",
            "workflow_version": 3,
            "status": "STARTED" if number == 0 else "COMPENSATING",
            "current_step": number,
            "correlation_id": "c-1",
            "initiated_by": "web",
            "payload": {"order": 7, "name": "Zoë 注文"},
            "error_message": None if number == 0 else f"error {number}",
            "timestamp": "2030-01-01T12:00:00.123Z",
        }
        assert one.headers == {
            "ce_specversion": "1.0",
            "ce_id": one.event_id,
            "ce_source": "/k1s0/system/saga",
            "ce_type": one.event_type,
            "ce_time": one.value["timestamp"],
            "ce_subject": saga.saga_id,
            "content-type": "application/json",
        }
    (bare,) = (one for one in received if one.key == other.saga_id)
    assert (bare.value["correlation_id"], bare.value["initiated_by"], bare.value["payload"]) == (None, None, {})
    # A failed compensation is with the dead letters too: the same event, not another one.
    (copy,) = (one for one in received if one.topic == f"{topic}.dlq")
    (original,) = (one for one in of_saga if one.event_type == EventType.SAGA_COMPENSATION_FAILED)
    assert (copy.key, copy.value, copy.headers) == (original.key, original.value, original.headers)


async def test_events_of_each_saga_keep_their_order_while_many_move_at_once(
    broker: AnyBroker, postgres_dsn: str
) -> None:
    topic, sagas = broker.topic(), {}
    async with (
        open_loop(),
        open_postgres(postgres_dsn, events=True) as store,
        relay_of(store, broker, topic) as relay,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(relay.run)

        async def one(moves: int) -> None:
            sagas[await several_moves(store, moves)] = moves

        async with trio.open_nursery() as writers:
            for number in range(40):
                writers.start_soon(one, 3 + number % 7)
        with reader(broker, topic) as read:
            await trio.to_thread.run_sync(read.until, sum(sagas.values()) + len(sagas))
            nursery.cancel_scope.cancel()
    with reader(broker, topic) as read:
        received = await trio.to_thread.run_sync(read.rest)
    check_order(received, sagas)
    assert len(received) == len(first_of_each(received))


async def test_a_broker_that_is_away_at_the_start_is_waited_for(mock_broker: MockBroker) -> None:
    topic = mock_broker.topic()
    mock_broker.down()
    async with memory_store() as store, relay_of(store, mock_broker, topic) as relay:
        saga_id = await several_moves(store, 3)
        with pytest.raises(BrokerAway):
            await relay.run_once()
        with pytest.raises(BrokerAway):
            await relay.check()
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            mock_broker.up()
            with reader(mock_broker, topic) as read:
                check_order(await trio.to_thread.run_sync(read.until, 4), {saga_id: 3})
            nursery.cancel_scope.cancel()
        assert (await store.outbox.backlog("any")).pending == 0


async def test_a_broker_that_goes_and_comes_back_gets_everything_in_order(mock_broker: MockBroker) -> None:
    topic = mock_broker.topic()
    async with memory_store() as store, relay_of(store, mock_broker, topic) as relay:
        sagas = [await created(store) for _ in range(10)]

        async def all_step(number: int) -> None:
            for place, saga in enumerate(sagas):
                sagas[place] = await step(store, saga, number)

        async with trio.open_nursery() as nursery:
            await nursery.start(relay.run)
            with reader(mock_broker, topic) as read:
                await all_step(1)
                await trio.to_thread.run_sync(read.until, 20)
                await relay.check()
                mock_broker.down()
                await all_step(2)
                # The broker goes once more while it is being written to.
                mock_broker.up()
                await trio.to_thread.run_sync(read.until, 21)
                mock_broker.down()
                await all_step(3)
                mock_broker.up()
                await all_step(4)
                received = await trio.to_thread.run_sync(read.until, 50)
            nursery.cancel_scope.cancel()
        check_order(received, {saga.saga_id: 4 for saga in sagas})
        assert (await store.outbox.backlog("any")).pending == 0


async def test_a_message_the_broker_refuses_for_good_is_laid_aside_and_the_others_go_on(broker: AnyBroker) -> None:
    topic = broker.topic(1, max_message_bytes=2000)
    if isinstance(broker, MockBroker):
        # The first request has all five. Then each goes alone; the third is the one.
        broker.answer(PRODUCE, MESSAGE_TOO_LARGE, 0, 0, MESSAGE_TOO_LARGE)
    async with memory_store() as store, relay_of(store, broker, topic) as relay:
        small = await several_moves(store, 1)
        large = await created(store, payload={"much": "x" * 5000})
        last = await several_moves(store, 1)
        done = await relay.run_once()
        assert (done.published, done.dead, done.unsent) == (4, 1, 0)
        assert (relay.published, relay.dead) == (4, 1)
        dead = store._writer._connection.execute("SELECT * FROM outbox_dead").fetchall()
        assert [(row["topic"], row["saga_id"], row["event_type"]) for row in dead] == [
            (topic, large.saga_id, EventType.SAGA_STARTED)
        ]
        assert "MessageSizeTooLarge" in dead[0]["reason"]
        message = json.loads(dead[0]["message"])
        assert (message["event_id"], message["payload"]) == (dead[0]["event_id"], large.payload)
        # What comes after it is not held up, nor is it tried again.
        await step(store, large, 1)
        if isinstance(broker, MockBroker):
            assert (await relay.run_once()).published == 1
        else:
            assert (await relay.run_once()).dead == 1
    with reader(broker, topic) as read:
        received = await trio.to_thread.run_sync(read.rest)
    of_others = [one for one in received if one.key != large.saga_id]
    check_order(of_others, {small: 1, last: 1})


async def test_a_topic_that_may_not_be_written_does_not_hold_up_the_other(mock_broker: MockBroker) -> None:
    topic = mock_broker.topic(1)
    # The copies go first.
    mock_broker.answer(PRODUCE, TOPIC_AUTHORIZATION_FAILED)
    async with memory_store() as store, relay_of(store, mock_broker, topic) as relay:
        saga = await created(store)
        failed = event(EventType.SAGA_COMPENSATION_FAILED, SagaStatus.COMPENSATING, 1, "no")
        await store.record(move(saga, status=SagaStatus.COMPENSATING, current_step=1, events=(failed, failed)))
        done = await relay.run_once()
        assert (done.published, done.dead, done.unsent) == (3, 2, 0)
        dead = store._writer._connection.execute("SELECT topic, reason FROM outbox_dead").fetchall()
        assert {row["topic"] for row in dead} == {f"{topic}.dlq"}
        assert all("TopicAuthorizationFailed" in row["reason"] for row in dead)
    with reader(mock_broker, topic, f"{topic}.dlq") as read:
        assert [one.topic for one in await trio.to_thread.run_sync(read.rest)] == [topic] * 3


async def test_events_wait_while_their_topic_may_not_be_written(mock_broker: MockBroker) -> None:
    topic = mock_broker.topic(1)
    async with memory_store() as store, relay_of(store, mock_broker, topic) as relay:
        await created(store)
        mock_broker.answer(PRODUCE, TOPIC_AUTHORIZATION_FAILED)
        stalled = await relay.run_once()
        assert (stalled.published, stalled.dead, stalled.unsent) == (0, 0, 1)
        assert "TopicAuthorizationFailed" in stalled.reason
        assert (await relay.run_once()).published == 1


async def test_an_error_that_says_nothing_is_tried_again_before_it_counts_as_a_refusal(mock_broker: MockBroker) -> None:
    topic = mock_broker.topic(1)
    async with memory_store() as store, relay_of(store, mock_broker, topic) as relay:
        await created(store)
        mock_broker.answer(PRODUCE, UNKNOWN_SERVER_ERROR, UNKNOWN_SERVER_ERROR)
        assert (await relay.run_once()).published == 1
        await created(store)
        mock_broker.answer(PRODUCE, *[UNKNOWN_SERVER_ERROR] * 3)
        assert (await relay.run_once()).dead == 1


class LosesAcknowledgements:
    """An outbox whose process dies when it is to note what was published: everything else is the real one's."""

    def __init__(self, real: Outbox) -> None:
        self._real = real

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    async def settle(self, settled: Settled) -> None:
        raise Unavailable("killed before it was noted")


async def test_a_relay_that_dies_before_it_has_noted_what_was_acknowledged_loses_nothing(broker: AnyBroker) -> None:
    topic = broker.topic()
    async with memory_store() as store:
        sagas = {await several_moves(store, 4): 4 for _ in range(5)}
        dying: Outbox = LosesAcknowledgements(store.outbox)  # type: ignore[assignment]  # the rest is passed on
        async with relay_of(store, broker, topic, outbox=dying) as relay:
            with pytest.raises(Unavailable):
                await relay.run_once()
        async with relay_of(store, broker, topic) as relay:
            assert (await relay.run_once()).published == 25
    with reader(broker, topic) as read:
        received = await trio.to_thread.run_sync(read.rest)
    check_order(received, sagas)
    assert len(received) == 2 * len(first_of_each(received))


async def test_a_database_that_is_away_when_it_is_to_be_noted_causes_no_second_message(broker: AnyBroker) -> None:
    topic = broker.topic()
    async with memory_store() as store:
        await several_moves(store, 4)
        away: Outbox = LosesAcknowledgements(store.outbox)  # type: ignore[assignment]  # the rest is passed on
        async with relay_of(store, broker, topic, outbox=away) as relay:
            with pytest.raises(Unavailable):
                await relay.run_once()
            relay._outbox = store.outbox
            assert (await relay.run_once()).published == 0
            assert (await store.outbox.backlog("any")).pending == 0
    with reader(broker, topic) as read:
        received = await trio.to_thread.run_sync(read.rest)
    assert len(received) == len(first_of_each(received)) == 5


async def test_two_workers_relay_side_by_side_and_no_saga_gets_out_of_order(
    broker: AnyBroker, postgres_dsn: str
) -> None:
    topic, sagas = broker.topic(), {}
    async with (
        open_loop(),
        open_postgres(postgres_dsn, events=True) as one_store,
        open_postgres(postgres_dsn, events=True) as other_store,
        relay_of(one_store, broker, topic, lease_secs=1.0) as one_relay,
        relay_of(other_store, broker, topic, lease_secs=1.0) as other_relay,
    ):

        async def write(store: PostgresStore, moves: int) -> None:
            for _ in range(4):
                sagas[await several_moves(store, moves)] = moves

        leaving = trio.CancelScope()

        async def relay_until_it_leaves(task_status: trio.TaskStatus[None]) -> None:
            with leaving:
                await one_relay.run(task_status=task_status)

        async with trio.open_nursery() as nursery:
            await nursery.start(relay_until_it_leaves)
            await nursery.start(other_relay.run)
            with reader(broker, topic) as read:
                for _ in range(3):
                    async with trio.open_nursery() as writers:
                        for store in (one_store, other_store):
                            for moves in (3, 5, 8):
                                writers.start_soon(write, store, moves)
                    await trio.to_thread.run_sync(read.until, sum(sagas.values()) + len(sagas))
                    # Both, each with its part; then one alone.
                    leaving.cancel()
                received = await trio.to_thread.run_sync(read.rest)
            nursery.cancel_scope.cancel()
    check_order(received, sagas)
    assert other_relay.published > 0


async def test_the_timestamp_of_an_event_is_when_it_happened_not_when_it_was_sent(broker: AnyBroker) -> None:
    topic, clock = broker.topic(), StandingClock()
    async with memory_store(clock) as store, relay_of(store, broker, topic) as relay:
        await store.create(new_saga())
        clock.instant = datetime(2031, 5, 6, 7, 8, 9, 999999, tzinfo=UTC)
        await store.create(new_saga())
        await relay.run_once()
    with reader(broker, topic) as read:
        received = await trio.to_thread.run_sync(read.until, 2)
    assert {one.value["timestamp"] for one in received} == {"2030-01-01T12:00:00.123Z", "2031-05-06T07:08:09.999Z"}
