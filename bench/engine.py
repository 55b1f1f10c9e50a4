"""One worker's engine under load: sagas started through the service, run on a store, against one participant.

`python -m bench.engine` with the options below prints one JSON object. It runs in a process of its own so that its CPU
time is the worker's alone.
"""

from __future__ import annotations

import argparse

import bridge  # noqa: F401  isort: skip  (before grpclib)
import json
import os
import random
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from bridge import open_loop
from rpc.caller import GrpcStepCaller
from rpc.settings import ServiceSettings
from saga.catalog import Catalog
from saga.meter import Meter
from saga.runner import Engine
from saga.service import SagaService, StartSaga
from saga.supervisor import Limits, Supervisor
from saga.watchers import Watchers
from store.instants import SystemClock
from store.kafka import KafkaPublisher, KafkaSettings
from store.outbox import Relay
from store.postgres import PostgresStore, open_postgres
from store.sqlite import SqliteStore, open_sqlite

STEPS = 3
WORKFLOW = "name: bench\nsteps:\n" + "".join(
    f"  - {{name: step-{number}, service: participant, method: Participant.Do, compensate: Participant.Undo}}\n"
    for number in range(STEPS)
)
HANGING = """\
name: hanging
steps:
  - {name: for-ever, service: participant, method: Participant.Hang, timeout_secs: 3600}
"""
PAYLOAD = {"order_id": "o-1", "quantity": 1}

AnyStore = PostgresStore | SqliteStore


@asynccontextmanager
async def worker(store: AnyStore, port: int, max_concurrent: int) -> AsyncIterator[SagaService]:
    """A worker as `server.app` wires it, without the doors."""
    clock, watchers, catalog = SystemClock(), Watchers(), Catalog(store)
    caller = GrpcStepCaller({"participant": ServiceSettings(host="127.0.0.1", port=port)})
    engine = Engine(
        store=store,
        caller=caller,
        clock=clock,
        watchers=watchers,
        meter=Meter(),
        draw=random.random,
        park_after_secs=30.0,
    )
    limits = Limits(max_concurrent=max_concurrent, shutdown_grace_secs=1.0)
    supervisor = Supervisor(engine, catalog, f"bench-{os.getpid()}", limits)
    service = SagaService(
        store, supervisor, catalog, watchers, clock, services=["participant"], max_payload_bytes=1 << 20
    )
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor.run)
            await service.register_workflow(WORKFLOW)
            yield service
            await supervisor.drain()
    finally:
        await caller.aclose()


async def load(service: SagaService, sagas: int, in_flight: int) -> list[float]:
    """Runs `sagas` sagas, `in_flight` at a time; the seconds each took from its start call to its end."""
    left = sagas
    lasted: list[float] = []

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            began = time.perf_counter()
            started = await service.start(StartSaga(workflow_name="bench", payload=PAYLOAD))
            with service.watch(started.saga.saga_id, started.saga) as watch:
                while (saga := await watch.next()) is not None:
                    last = saga
            assert last.status == "COMPLETED", last
            lasted.append(time.perf_counter() - began)

    async with trio.open_nursery() as nursery:
        for _ in range(in_flight):
            nursery.start_soon(client)
    return sorted(lasted)


async def measure(store: AnyStore, port: int, sagas: int, in_flight: int) -> dict[str, Any]:
    async with worker(store, port, in_flight + in_flight // 4 + 1) as service:
        await load(service, max(50, sagas // 10), in_flight)  # connections, plans and caches are warm after it
        batches = sum(lane.batches for lane in store.lanes)
        rows = sum(lane.rows for lane in store.lanes)
        wall, cpu = time.perf_counter(), time.process_time()
        lasted = await load(service, sagas, in_flight)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        batches = sum(lane.batches for lane in store.lanes) - batches
        rows = sum(lane.rows for lane in store.lanes) - rows
    return {
        "sagas_per_s": sagas / wall,
        "steps_per_s": sagas * STEPS / wall,
        "cpu_us_per_step": cpu / (sagas * STEPS) * 1e6,
        "p50_ms": lasted[len(lasted) // 2] * 1e3,
        "p99_ms": lasted[int(len(lasted) * 0.99)] * 1e3,
        "mean_batch": rows / max(batches, 1),
    }


async def backlog(store: AnyStore, port: int, sagas: int) -> dict[str, Any]:
    """Memory of a worker with `sagas` waiting in the store and 100 places, all taken by sagas that do not end."""
    async with worker(store, port, 100) as service:
        await service.register_workflow(HANGING)
        left = sagas

        async def client() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await service.start(StartSaga(workflow_name="hanging", payload=PAYLOAD))

        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(client)
        took = time.perf_counter() - began
        waiting = sum((await service.count_open()).values())
        return {"waiting": waiting, "starts_per_s": sagas / took, "rss_mb": resident_bytes() / 1e6}


def resident_bytes() -> int:
    """Memory of this process now (not its peak, which `getrusage` gives)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@asynccontextmanager
async def opened(store: str, events: bool) -> AsyncIterator[AnyStore]:
    """The store: a Postgres DSN, or the path of an SQLite file."""
    if store.startswith("postgresql://"):
        async with open_postgres(store, events=events) as postgres:
            yield postgres
    else:
        async with open_sqlite(store, events=events) as sqlite:
            yield sqlite


@asynccontextmanager
async def relayed(store: AnyStore, bootstrap: str | None, topic: str) -> AsyncIterator[None]:
    """Publishes what the store's outbox gets meanwhile, in this process, as a server does."""
    async with trio.open_nursery() as nursery:
        if bootstrap is not None:
            publisher = KafkaPublisher(KafkaSettings(brokers=(bootstrap,)), client_id="bench")
            await nursery.start(Relay(store.outbox, publisher, relay_id="bench", topic=topic).run)
        yield
        nursery.cancel_scope.cancel()


async def main(options: argparse.Namespace) -> None:
    async with (
        open_loop(),
        opened(options.store, options.events) as store,
        relayed(store, options.bootstrap, options.topic),
    ):
        if options.backlog:
            result = await backlog(store, options.port, options.sagas)
        else:
            result = await measure(store, options.port, options.sagas, options.in_flight)
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--port", type=int, required=True, help="the participant's")
    parser.add_argument("--sagas", type=int, required=True)
    parser.add_argument("--in-flight", type=int, default=100)
    parser.add_argument("--events", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bootstrap", help="a broker: events are published too")
    parser.add_argument("--topic", default="")
    parser.add_argument("--backlog", action="store_true")
    trio.run(main, parser.parse_args())
