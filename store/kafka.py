"""The publisher on Kafka, by aiokafka's idempotent producer (acks=all), behind plain Trio functions.

Batches are made here and not by `producer.send`: one batch of a topic's partition at a time, the next when the one
before it is acknowledged. With that a batch that is refused cannot be overtaken by the next one.

A producer that has failed in any way is thrown away. An idempotent producer numbers its batches, and after one that
never arrived the broker would refuse every later one as out of order; and what a producer still holds it would send
whenever it can, from memory that grows. A new one costs two round trips.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trio
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    CorruptRecordException,
    InvalidTimestampError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    PolicyViolationError,
    ProducerClosed,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
    UnknownError,
    UnknownTopicOrPartitionError,
    UnsupportedForMessageFormatError,
)
from aiokafka.partitioner import DefaultPartitioner

from bridge import StrayCancel, run_aio
from store.cloudevents import Message
from store.kafka_tls import RenewedContext, TlsFiles
from store.outbox import Acknowledged, BrokerAway, Outcome, Refused, Unsent

CONNECT_SECS = 5.0
"""How long connecting may take, from the name's address to the producer's id."""

REQUEST_SECS = 10.0
"""How long the broker has for one request, before the connection counts as broken."""

TOPIC_SECS = 3.0
"""How long a topic may stay unknown to a broker that answers (it may be making it), before it counts as missing. Only
the first time: what is published behind it waits as long."""

CLOSE_SECS = 0.5
"""How long a producer may take to end before it is cut off. It has nothing left to deliver by then."""

CHECK_SECS = 2.0
"""How long the broker has to answer a readiness check."""

BATCH_BYTES = 256 * 1024
"""Of one batch; a larger message is a batch of its own. Well below what brokers accept by default (1 MiB)."""

UNCLEAR_TRIES = 3
"""How often a message, alone in its batch, may meet an error that says nothing, before it counts as refused."""

REFUSES_TOPIC = (TopicAuthorizationFailedError, InvalidTopicError)
"""Whatever is sent there. The fault is no message's, and a person may mend it."""

REFUSES_MESSAGE = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    InvalidTimestampError,
    PolicyViolationError,
    UnsupportedForMessageFormatError,
)
"""Some message of the batch."""

UNCLEAR = (UnknownError, CorruptRecordException)
"""The broker met something unexpected (so it answers for codes newer than the library too), or got damaged bytes."""


_LIBRARY_LOG = logging.getLogger("aiokafka")


@dataclass(frozen=True)
class KafkaSettings:
    """How to reach the brokers. `security_protocol` and `sasl_mechanism` as Kafka spells them. `ca_file` None:
    the system's roots; `cert_file` and `key_file`, together: what brokers that ask for a certificate are shown."""

    brokers: tuple[str, ...]
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class KafkaPublisher:
    """Keeps `store.outbox.Publisher`. To be used inside `bridge.open_loop()`."""

    def __init__(self, settings: KafkaSettings, *, client_id: str) -> None:
        self._settings = settings
        self._client_id = client_id
        self._partitioner = DefaultPartitioner()
        self._producer: Any = None
        # Topics that nobody had made when they were last asked for. To be asked again, but not waited for.
        self._missing: set[str] = set()
        self._tls: ssl.SSLContext | None = None
        if settings.security_protocol.endswith("SSL"):
            self._tls = RenewedContext(TlsFiles(settings.ca_file, settings.cert_file, settings.key_file))

    # --- store.outbox.Publisher ---------------------------------------------------------------------------------------

    async def connect(self) -> None:
        if self._producer is None:
            await _crossing(self._start())

    async def publish(self, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        await _crossing(self._publish(messages, outcomes))

    async def check(self) -> None:
        if self._producer is None:
            raise BrokerAway("there is no connection to the broker")
        answered = False
        with trio.move_on_after(CHECK_SECS):
            answered = await _crossing(_ask_for_metadata(self._producer))
        if not answered:
            raise BrokerAway("the broker does not answer")

    async def aclose(self) -> None:
        await _crossing(self._discard())

    # --- in asyncio ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        settings = self._settings
        producer = AIOKafkaProducer(
            bootstrap_servers=list(settings.brokers),
            client_id=self._client_id,
            acks="all",
            enable_idempotence=True,
            max_batch_size=BATCH_BYTES,
            request_timeout_ms=int(REQUEST_SECS * 1000),
            security_protocol=settings.security_protocol,
            ssl_context=self._tls,
            sasl_mechanism=settings.sasl_mechanism or "PLAIN",
            sasl_plain_username=settings.username,
            sasl_plain_password=settings.password,
        )
        with _LastWords() as last_words:
            try:
                async with asyncio.timeout(CONNECT_SECS):
                    await producer.start()
            except BaseException as error:
                # Also when start() was cut short: what it has opened is to be closed.
                await _stop(producer)
                if isinstance(error, KafkaError | OSError | TimeoutError):
                    brokers = ", ".join(settings.brokers)
                    why = last_words.text or _told(error)
                    raise BrokerAway(f"no broker of {brokers} can be used: {why}") from error
                raise
        self._producer = producer

    async def _discard(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _stop(producer)

    async def _publish(self, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        work = _Work(messages, outcomes)
        clean = False
        try:
            while left := work.left():
                try:
                    if self._producer is None:
                        await self._start()
                except BrokerAway as error:
                    work.give_up(left, str(error))
                    return
                if await self._send_round(work, left):
                    break
                # Something was refused: what else was in its batch, or behind it, goes with a new producer.
                await self._discard()
            clean = not any(isinstance(outcome, Unsent) for outcome in outcomes)
        finally:
            if not clean:
                await self._discard()

    async def _send_round(self, work: _Work, places: Sequence[int]) -> bool:
        """Sends what it can. False: something was refused, and there may be more to be sent."""
        chains: dict[tuple[str, int], list[int]] = defaultdict(list)
        by_topic: dict[str, list[int]] = defaultdict(list)
        for place in places:
            by_topic[work.messages[place].topic].append(place)
        for topic, of_topic in by_topic.items():
            partitions = await self._partitions(work, topic, of_topic)
            for place in of_topic if partitions else ():
                partition = self._partitioner(work.messages[place].key, partitions, partitions)
                chains[topic, partition].append(place)
        sent = await asyncio.gather(
            *(self._send_chain(work, topic, partition, chain) for (topic, partition), chain in chains.items())
        )
        return all(sent)

    async def _partitions(self, work: _Work, topic: str, places: list[int]) -> list[int] | None:
        """The topic's partitions; None: it has none now, and its messages know why."""
        producer = self._producer
        try:
            if topic in self._missing and not await _has_topic(producer, topic):
                raise UnknownTopicOrPartitionError
            async with asyncio.timeout(TOPIC_SECS):
                partitions = sorted(await producer.partitions_for(topic))
            self._missing.discard(topic)
        except REFUSES_TOPIC as error:
            work.give_up(places, _told(error), no_topic=True)
        except (KafkaError, TimeoutError) as error:
            # Either the broker does not answer, or it does and has no such topic.
            if isinstance(error, TimeoutError | UnknownTopicOrPartitionError) and await _ask_for_metadata(producer):
                self._missing.add(topic)
                work.give_up(places, f"the broker has no topic {topic}", no_topic=True)
            else:
                work.give_up(places, _told(error))
        else:
            return partitions
        return None

    async def _send_chain(self, work: _Work, topic: str, partition: int, chain: list[int]) -> bool:
        """Sends the messages of one partition, batch after batch. False: it ends early because one was refused."""
        producer = self._producer
        begin = 0
        while begin < len(chain):
            batch = producer.create_batch()
            taken: list[int] = []
            for place in chain[begin:]:
                message = work.messages[place]
                if taken and (place in work.suspects or taken[0] in work.suspects):
                    break
                # None: the batch is full. The first message always fits.
                if (
                    batch.append(
                        timestamp=message.timestamp_ms,
                        key=message.key,
                        value=message.value,
                        headers=list(message.headers),
                    )
                    is None
                ):
                    break
                taken.append(place)
            batch.close()
            try:
                await (await producer.send_batch(batch, topic, partition=partition))
            except REFUSES_TOPIC as error:
                work.give_up(chain[begin:], _told(error), no_topic=True)
                return True
            except (*REFUSES_MESSAGE, *UNCLEAR) as error:
                if len(taken) > 1:
                    work.suspects.update(taken)
                elif isinstance(error, REFUSES_MESSAGE) or work.is_hopeless(taken[0]):
                    work.refuse(taken, _told(error))
                return False
            except KafkaError as error:
                work.give_up(chain[begin:], _told(error))
                return True
            work.acknowledge(taken)
            begin += len(taken)
        return True


class _Work:
    """The messages of one call and what is known of each. `suspects` were in a batch that was refused: each is sent
    alone, to find out which it was."""

    def __init__(self, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        self.messages = messages
        self.suspects: set[int] = set()
        self._outcomes = outcomes
        self._settled: set[int] = set()
        self._unclear: Counter[int] = Counter()

    def left(self) -> list[int]:
        """What is still to be sent in this call, in order."""
        return [place for place in range(len(self.messages)) if place not in self._settled]

    def acknowledge(self, places: Sequence[int]) -> None:
        self._settle(places, Acknowledged())

    def refuse(self, places: Sequence[int], reason: str) -> None:
        self._settle(places, Refused(reason))

    def give_up(self, places: Sequence[int], reason: str, *, no_topic: bool = False) -> None:
        self._settle(places, Unsent(reason, no_topic))

    def is_hopeless(self, place: int) -> bool:
        """Counts an error that says nothing; True: it was one too many."""
        self._unclear[place] += 1
        return self._unclear[place] >= UNCLEAR_TRIES

    def _settle(self, places: Sequence[int], outcome: Outcome) -> None:
        for place in places:
            self._outcomes[place] = outcome
        self._settled.update(places)


class _LastWords(logging.Handler):
    """What the library has logged last in the block. Why it cannot connect (a bad password, an unknown certificate) it
    tells nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()

    def __enter__(self) -> _LastWords:
        _LIBRARY_LOG.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        _LIBRARY_LOG.removeHandler(self)


async def _ask_for_metadata(producer: Any) -> bool:
    """Whether a broker answers."""
    return bool(await producer.client.force_metadata_update())


async def _has_topic(producer: Any, topic: str) -> bool:
    """Whether a broker names the topic now; False also when none answers."""
    client = producer.client
    # A producer asks for the topics it knows, and a new one knows none.
    await client.add_topic(topic)
    await client.force_metadata_update()
    return client.cluster.partitions_for_topic(topic) is not None


async def _stop(producer: Any) -> None:
    """Ends a producer in bounded time, without what it still holds: `stop()` alone would wait for that to be delivered,
    for ever if the broker is away. Nothing of it is left, no task and no error that nobody has heard.
    `test_a_producer_that_is_given_up_leaves_nothing_behind`."""
    _drop_what_it_holds(producer._message_accumulator)
    client = producer.client
    try:
        # Not asyncio.timeout: in a task that was cancelled before, Python 3.11.2 takes its end for that cancel.
        await asyncio.wait_for(producer.stop(), CLOSE_SECS)
    except (TimeoutError, KafkaError, OSError):
        # Cut short, stop() has ended the sender; the connections are left, and requests that wait for metadata.
        try:
            await asyncio.wait_for(client.close(), CLOSE_SECS)
        except (TimeoutError, KafkaError, OSError):
            pass
        awaited = client._md_update_fut
        if awaited is not None and not awaited.done():
            awaited.set_result(False)


def _drop_what_it_holds(accumulator: Any) -> None:
    batches = accumulator._pending_batches
    for waiting in accumulator._batches.values():
        # As those under way: one that was put back, to be tried again, takes itself out of there when it fails.
        batches.update(waiting)
    accumulator._batches.clear()
    # What a request under way has failed with is not to be put back.
    accumulator.reenqueue = lambda _batch: None
    for batch in batches:
        batch.failure(ProducerClosed())
        for future in (batch.future, batch._drain_waiter):
            if future.done() and not future.cancelled():
                future.exception()  # heard: asyncio complains of errors that nobody has asked for


async def _crossing(coro: Any) -> Any:
    """Into asyncio; a future that the library cancels under us is a connection that was lost."""
    try:
        return await run_aio(coro)
    except StrayCancel as error:
        raise BrokerAway("the connection to the broker was closed") from error


def _told(error: BaseException) -> str:
    """What an error says; the library's begin with their name already, others may say nothing."""
    return str(error) if isinstance(error, KafkaError) else f"{type(error).__name__} {error}".strip()
