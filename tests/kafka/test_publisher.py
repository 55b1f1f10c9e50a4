"""The publisher by itself: what it leaves behind, what it does not wait for, what it says when it cannot connect."""

from __future__ import annotations

import asyncio
import gc
import uuid

import pytest
import trio
import trio.testing

from bridge import open_loop
from store.cloudevents import Message
from store.kafka import KafkaPublisher, KafkaSettings
from store.outbox import Acknowledged, BrokerAway, Outcome, Unsent
from tests.kafka.conftest import AnyBroker
from tests.support.kafka import NOT_LEADER, PRODUCE, MockBroker, reader
from tests.support.server_process import free_port


def publisher_to(bootstrap: str) -> KafkaPublisher:
    return KafkaPublisher(KafkaSettings(brokers=(bootstrap,)), client_id="test")


def messages_to(topic: str, count: int, size: int = 10) -> list[Message]:
    return [
        Message(
            topic=topic,
            key=f"key-{number % 7}".encode(),
            value=b'{"event_id": "%s", "number": %d, "much": "%s"}' % (str(uuid.uuid4()).encode(), number, b"x" * size),
            headers=(),
            timestamp_ms=1,
        )
        for number in range(count)
    ]


def unsent(count: int) -> list[Outcome]:
    return [Unsent("not tried")] * count


@pytest.mark.parametrize("trouble", ["down", "slow", "not leading"])
async def test_a_producer_that_is_given_up_leaves_nothing_behind(
    mock_broker: MockBroker, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    topic = mock_broker.topic(4)
    messages = messages_to(topic, 400, size=5000)
    async with open_loop():
        publisher = publisher_to(mock_broker.bootstrap)
        outcomes = unsent(len(messages))
        await publisher.publish(messages, outcomes)
        assert outcomes == [Acknowledged()] * len(messages)
        if trouble == "down":
            mock_broker.down()
        elif trouble == "slow":
            mock_broker.answer_after(30)
        else:
            mock_broker.lead(topic, 4, is_led=False)  # what is not taken waits for another leader
        outcomes = unsent(len(messages))
        with trio.move_on_after(0.3) as scope:
            await publisher.publish(messages, outcomes)
        assert scope.cancelled_caught
        assert outcomes == unsent(len(messages))
        # What it held is gone, down to the last task and the last error nobody has asked for.
        assert asyncio.all_tasks() == set()
        gc.collect()
        await trio.testing.wait_all_tasks_blocked()
        assert "stray_error" not in caplog.text
        # The next one begins anew.
        mock_broker.up()
        mock_broker.answer_after(0)
        mock_broker.lead(topic, 4, is_led=True)
        outcomes = unsent(3)
        await publisher.publish(messages[:3], outcomes)
        assert outcomes == [Acknowledged()] * 3
        await publisher.aclose()
        assert asyncio.all_tasks() == set()


async def test_what_can_be_retried_is_retried_within_one_call(mock_broker: MockBroker) -> None:
    topic = mock_broker.topic(1)
    mock_broker.answer(PRODUCE, NOT_LEADER, NOT_LEADER)
    async with open_loop():
        publisher = publisher_to(mock_broker.bootstrap)
        outcomes = unsent(5)
        await publisher.publish(messages_to(topic, 5), outcomes)
        await publisher.aclose()
    assert outcomes == [Acknowledged()] * 5


async def test_batches_of_one_key_keep_their_order_however_many_they_are(broker: AnyBroker) -> None:
    topic = broker.topic(3)
    messages = messages_to(topic, 300, size=20_000)
    async with open_loop():
        publisher = publisher_to(broker.bootstrap)
        outcomes = unsent(len(messages))
        await publisher.publish(messages, outcomes)
        await publisher.check()
        await publisher.aclose()
    assert outcomes == [Acknowledged()] * len(messages)
    with reader(broker, topic) as read:
        received = await trio.to_thread.run_sync(read.until, len(messages))
    for key in range(7):
        numbers = [one.value["number"] for one in received if one.key == f"key-{key}"]
        assert numbers == list(range(key, len(messages), 7))


async def test_a_topic_that_was_missing_is_asked_for_but_not_waited_for_again(
    mock_broker: MockBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = mock_broker.topic(1)
    mock_broker.lose_topic(topic)
    async with open_loop():
        publisher = publisher_to(mock_broker.bootstrap)

        async def sent() -> list[Outcome]:
            outcomes = unsent(1)
            await publisher.publish(messages_to(topic, 1), outcomes)
            return outcomes

        missing = [Unsent(f"the broker has no topic {topic}", no_topic=True)]
        # It may be being made just now: it is given time, once.
        monkeypatch.setattr("store.kafka.TOPIC_SECS", 0.3)
        assert await sent() == missing
        for bound in ("TOPIC_SECS", "REQUEST_SECS"):
            monkeypatch.setattr(f"store.kafka.{bound}", 3600.0)
        with trio.fail_after(20):
            assert await sent() == missing
            mock_broker.find_topic(topic)
            assert await sent() == [Acknowledged()]
        await publisher.aclose()


async def test_why_it_cannot_connect_is_told() -> None:
    port = free_port()
    async with open_loop():
        publisher = publisher_to(f"127.0.0.1:{port}")
        with pytest.raises(BrokerAway, match=rf"127\.0\.0\.1:{port}.*[Cc]onnect call failed"):
            await publisher.connect()
        with pytest.raises(BrokerAway):
            await publisher.check()
        await publisher.aclose()


def test_settings_do_not_show_their_password() -> None:
    settings = KafkaSettings(brokers=("k:1",), username="me", password="hunter2")
    assert "hunter2" not in repr(settings)
