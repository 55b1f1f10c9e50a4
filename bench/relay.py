"""The relay alone: a full outbox, one relay, until the broker has acknowledged everything.

`python -m bench.relay --store DSN --bootstrap HOST:PORT --topic NAME --sagas N` prints one JSON object. Each saga has
three events: started, running, completed.
"""

from __future__ import annotations

import argparse

import bridge  # noqa: F401  isort: skip  (before anything imports grpclib)
import json
import time
from typing import Any

import msgspec
import trio

from bench.engine import PAYLOAD, AnyStore, opened, resident_bytes
from bridge import open_loop
from saga.model import EventType, SagaEvent, SagaStatus
from saga.ports import NewSaga, Record
from store.kafka import KafkaPublisher, KafkaSettings
from store.outbox import Relay

WRITERS = 200
EVENTS = 3


async def fill(store: AnyStore, sagas: int) -> None:
    """Sagas from start to end, as a worker would have written them."""
    left = sagas

    async def writer() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            number = f"{left:012x}"
            new = NewSaga(
                saga_id=f"{left * 40503 % 65536:04x}{'0' * 4}-0000-4000-8000-{number}",
                workflow_name="bench",
                workflow_version=1,
                payload=PAYLOAD,
                owner="bench",
            )
            saga = (await store.create(new)).saga
            for status, event_type in (
                (SagaStatus.RUNNING, EventType.SAGA_RUNNING),
                (SagaStatus.COMPLETED, EventType.SAGA_COMPLETED),
            ):
                event = SagaEvent(event_type=event_type, status=status, current_step=0)
                after = msgspec.structs.replace(saga, status=status)
                saga = (await store.record(Record(before=saga, after=after, events=(event,)))).saga

    async with trio.open_nursery() as nursery:
        for _ in range(WRITERS):
            nursery.start_soon(writer)


async def measure(store: AnyStore, bootstrap: str, topic: str, sagas: int) -> dict[str, Any]:
    await fill(store, sagas)
    publisher = KafkaPublisher(KafkaSettings(brokers=(bootstrap,)), client_id="bench")
    relay = Relay(store.outbox, publisher, relay_id="bench", topic=topic)
    before = resident_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    while (await relay.run_once()).published:
        pass
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    await publisher.aclose()
    assert relay.published == sagas * EVENTS, relay.published
    return {
        "events_per_s": relay.published / wall,
        "cpu_us_per_event": cpu / relay.published * 1e6,
        "grown_mb": (resident_bytes() - before) / 1e6,
    }


async def main(options: argparse.Namespace) -> None:
    async with open_loop(), opened(options.store, True) as store:
        print(json.dumps(await measure(store, options.bootstrap, options.topic, options.sagas)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--sagas", type=int, required=True)
    trio.run(main, parser.parse_args())
