"""Kafka for tests: a broker, and a consumer from another library than the product's producer.

The broker is the mock cluster inside librdkafka, which comes with the confluent-kafka package: it speaks Kafka's
protocol over real sockets, and can be taken down, brought back on the same port, and told to refuse. Set
SAGA_TEST_KAFKA=host:port (`make test-kafka BOOTSTRAP=host:port`) to use a real one; what only the mock cluster can be
told to do is skipped then.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

READ_SECS = 60.0
"""How long a test waits for what has to come."""

UNKNOWN_TOPIC = 3
PRODUCE = 0
"""Kafka's number for the requests that carry messages."""
MESSAGE_TOO_LARGE = 10
TOPIC_AUTHORIZATION_FAILED = 29
NOT_LEADER = 6


@dataclass(frozen=True)
class Received:
    """One message as a consumer gets it."""

    topic: str
    partition: int
    key: str
    value: dict[str, Any]
    headers: dict[str, str]

    @property
    def event_id(self) -> str:
        event_id: str = self.value["event_id"]
        return event_id

    @property
    def event_type(self) -> str:
        event_type: str = self.value["event_type"]
        return event_type


class Broker(Protocol):
    """What both kinds can do."""

    bootstrap: str
    is_mock: bool

    def topic(self, partitions: int = 3, *, max_message_bytes: int | None = None) -> str:
        """The name of a new topic; its `.dlq` is made too. The mock cluster takes messages of any size."""
        ...


class MockBroker:
    """One broker of librdkafka's mock cluster, in this process, on a port of its own."""

    is_mock = True

    def __init__(self) -> None:
        self._library = library = _librdkafka()
        text = ctypes.create_string_buffer(512)
        self._client = library.rd_kafka_new(0, library.rd_kafka_conf_new(), text, len(text))
        if not self._client:
            raise RuntimeError(text.value.decode())
        self._cluster = library.rd_kafka_mock_cluster_new(self._client, 1)
        self.bootstrap = library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def topic(self, partitions: int = 3, *, max_message_bytes: int | None = None) -> str:
        name = f"saga-{uuid.uuid4().hex}"
        for one in (name, f"{name}.dlq"):
            self._library.rd_kafka_mock_topic_create(self._cluster, one.encode(), partitions, 1)
        return name

    def lose_topic(self, topic: str) -> None:
        """Says from now on that there is none of that name."""
        self._library.rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), UNKNOWN_TOPIC)

    def find_topic(self, topic: str) -> None:
        """Has it again."""
        self._library.rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), 0)

    def lead(self, topic: str, partitions: int, *, is_led: bool) -> None:
        """Whether its partitions have a leader, from now on."""
        for partition in range(partitions):
            leader = 1 if is_led else -1
            self._library.rd_kafka_mock_partition_set_leader(self._cluster, topic.encode(), partition, leader)

    def down(self) -> None:
        """Closes the port and every connection."""
        self._library.rd_kafka_mock_broker_set_down(self._cluster, 1)

    def up(self) -> None:
        """Is back, on the same port, with everything it had."""
        self._library.rd_kafka_mock_broker_set_up(self._cluster, 1)

    def answer(self, api_key: int, *codes: int) -> None:
        """What the next requests of a kind are answered with, one code each; 0: as usual."""
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, api_key, len(codes), (ctypes.c_int * len(codes))(*codes)
        )

    def answer_after(self, secs: float) -> None:
        """How long every answer takes from now on."""
        self._library.rd_kafka_mock_broker_set_rtt(self._cluster, 1, int(secs * 1000))

    def close(self) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)


class RealBroker:
    """A broker somebody else runs. Topics stay there; their names are new each time."""

    is_mock = False

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    def topic(self, partitions: int = 3, *, max_message_bytes: int | None = None) -> str:
        name = f"saga-{uuid.uuid4().hex}"
        config = {} if max_message_bytes is None else {"max.message.bytes": str(max_message_bytes)}
        # Named: the library gives up what a client without references was asked for.
        client = AdminClient({"bootstrap.servers": self.bootstrap})
        made = client.create_topics([NewTopic(one, partitions, 1, config=config) for one in (name, f"{name}.dlq")])
        for one, future in made.items():
            future.result(READ_SECS)
            # Made, but not yet led: the first messages would be turned away.
            give_up_at = time.monotonic() + READ_SECS
            while not _is_led(client, one, partitions):
                assert time.monotonic() < give_up_at, f"{one} has no leaders"
        return name


def _is_led(client: AdminClient, topic: str, partitions: int) -> bool:
    found = client.list_topics(topic, timeout=READ_SECS).topics[topic].partitions
    return len(found) == partitions and all(one.leader >= 0 for one in found.values())


@contextmanager
def running_broker() -> Iterator[MockBroker | RealBroker]:
    """A broker: the one the environment names, or one of our own."""
    bootstrap = os.environ.get("SAGA_TEST_KAFKA")
    if bootstrap:
        yield RealBroker(bootstrap)
        return
    broker = MockBroker()
    try:
        yield broker
    finally:
        broker.close()


class Reader:
    """Reads topics from their beginning, all partitions."""

    def __init__(self, bootstrap: str, *topics: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": uuid.uuid4().hex,  # the library wants one; nothing is committed
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "reconnect.backoff.max.ms": 200,
                "fetch.wait.max.ms": 20,
            }
        )
        found = self._consumer.list_topics(timeout=READ_SECS).topics
        self._consumer.assign(
            [TopicPartition(topic, partition, 0) for topic in topics for partition in found[topic].partitions]
        )
        self.received: list[Received] = []

    def until(self, count: int) -> list[Received]:
        """All messages so far, once there are `count` different events. Fails when they do not come."""
        give_up_at = time.monotonic() + READ_SECS
        while len({(one.topic, one.event_id) for one in self.received}) < count:
            assert time.monotonic() < give_up_at, f"{len(self.received)} messages, expected {count} events"
            self._take(0.5)
        return self.received

    def rest(self) -> list[Received]:
        """All messages, up to the ends of the partitions as they are now."""
        give_up_at = time.monotonic() + READ_SECS
        left = []
        for partition in self._consumer.assignment():
            end = self._consumer.get_watermark_offsets(partition, timeout=READ_SECS)[1]
            if end > 0:
                left.append((partition, end))
        while left:
            assert time.monotonic() < give_up_at, f"{len(self.received)} messages, and there are more"
            left = [(one, end) for one, end in left if self._consumer.position([one])[0].offset < end]
            self._take(0.5 if left else 0)
        return self.received

    def _take(self, secs: float) -> None:
        message = self._consumer.poll(secs)
        if message is None or message.error() is not None:
            return  # errors here are of a broker that is away; the library goes on by itself
        headers = cast("list[tuple[str, bytes]]", message.headers() or [])
        self.received.append(
            Received(
                topic=message.topic() or "",
                partition=message.partition() or 0,
                key=(message.key() or b"").decode(),
                value=json.loads(message.value() or b"null"),
                headers={name: value.decode() for name, value in headers},
            )
        )

    def close(self) -> None:
        self._consumer.close()


@contextmanager
def reader(broker: MockBroker | RealBroker, *topics: str) -> Iterator[Reader]:
    """Reads from a broker for as long as the block lasts."""
    opened = Reader(broker.bootstrap, *topics)
    try:
        yield opened
    finally:
        opened.close()


def first_of_each(received: list[Received]) -> list[Received]:
    """What a consumer keeps that passes over an `event_id` it has seen."""
    seen: dict[str, Received] = {}
    for one in received:
        seen.setdefault(one.event_id, one)
    return list(seen.values())


def _librdkafka() -> Any:
    """The library inside the confluent-kafka package, which exports the mock cluster although the package does not."""
    spec = importlib.util.find_spec("confluent_kafka")
    assert spec is not None
    assert spec.origin is not None
    (path,) = (Path(spec.origin).parents[1] / "confluent_kafka.libs").glob("librdkafka*.so*")
    library = ctypes.CDLL(str(path))
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, []),
        ("rd_kafka_new", pointer, [number, pointer, text, ctypes.c_size_t]),
        ("rd_kafka_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_new", pointer, [pointer, number]),
        ("rd_kafka_mock_cluster_bootstraps", text, [pointer]),
        ("rd_kafka_mock_cluster_destroy", None, [pointer]),
        ("rd_kafka_mock_topic_create", number, [pointer, text, number, number]),
        ("rd_kafka_mock_topic_set_error", None, [pointer, text, number]),
        ("rd_kafka_mock_partition_set_leader", number, [pointer, text, ctypes.c_int32, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_down", number, [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_up", number, [pointer, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_rtt", number, [pointer, ctypes.c_int32, number]),
        (
            "rd_kafka_mock_push_request_errors_array",
            None,
            [pointer, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(number)],
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
