"""Recovery: a worker is killed by SIGKILL with many sagas open, and another one brings them to their end.

`python -m bench.recovery --store DSN --port N --sagas N` prints one JSON object. Both runs begin with a store full of
sagas that nobody has begun and take them from there, with the leases of a server: `normal_s` is how long a worker needs
for `sagas` of them, `recovery_s` how long after the kill the second worker needs for as many that were open then, those
the dead worker owned included. `started_s` is the same number started one after the other, as clients do.
"""

from __future__ import annotations

import argparse

import bridge  # noqa: F401  isort: skip  (before anything imports grpclib)
import json
import subprocess
import sys
import time
import uuid
from typing import Any

import trio

from bench.engine import PAYLOAD, WORKFLOW, AnyStore, load, opened, worker
from bridge import open_loop
from saga.ports import NewSaga
from saga.workflow_yaml import parse_workflow

IN_FLIGHT = 100
BEFORE_THE_KILL = 0.2
"""Sagas that end before the kill, as a share of those that are open then."""
LOOK_SECS = 0.05
WRITERS = 200


async def fill(store: AnyStore, sagas: int) -> None:
    """Sagas that were accepted and that nobody has begun."""
    definition = parse_workflow(WORKFLOW, ["participant"])
    version = (await store.register_workflow(definition, WORKFLOW)).version
    left = sagas

    async def writer() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await store.create(
                NewSaga(
                    saga_id=str(uuid.uuid4()), workflow_name=definition.name, workflow_version=version, payload=PAYLOAD
                )
            )

    async with trio.open_nursery() as nursery:
        for _ in range(WRITERS):
            nursery.start_soon(writer)


async def open_sagas(store: AnyStore) -> int:
    return sum((await store.count_open()).values())


async def until_open(store: AnyStore, at_most: int) -> None:
    """Looks as often for the normal run as for the recovery: what that costs is in both."""
    while await open_sagas(store) > at_most:  # noqa: ASYNC110  # it is another process that ends them
        await trio.sleep(LOOK_SECS)


async def run_worker(options: argparse.Namespace) -> None:
    """The role of a worker: says when it has its lease, and runs until it is killed or its input ends."""
    async with open_loop(), opened(options.store, True) as store, worker(store, options.port, IN_FLIGHT):
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)


class WorkerProcess:
    """A worker in a process of its own, ready when this returns."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.recovery", "--worker"),
                *("--sagas", "0", "--port", str(options.port), "--store", options.store),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        self._process.communicate("\n")


async def main(options: argparse.Namespace) -> None:
    sagas, extra = options.sagas, int(options.sagas * BEFORE_THE_KILL)
    async with open_loop(), opened(options.store, True) as store:
        async with worker(store, options.port, IN_FLIGHT + 1) as service:
            await load(service, sagas // 10, IN_FLIGHT)
            began = time.perf_counter()
            await load(service, sagas, IN_FLIGHT)
            started_s = time.perf_counter() - began

        await fill(store, sagas)
        normal = WorkerProcess(options)
        began = time.perf_counter()
        await until_open(store, 0)
        normal_s = time.perf_counter() - began
        normal.stop()

        await fill(store, sagas + extra)
        killed, second = WorkerProcess(options), None
        try:
            await until_open(store, sagas)
            killed.kill()
            began = time.perf_counter()
            still_open = await open_sagas(store)
            second = WorkerProcess(options)
            await until_open(store, 0)
            recovery_s = time.perf_counter() - began
        finally:
            killed.kill()
            if second is not None:
                second.stop()
    result: dict[str, Any] = {
        "sagas": sagas,
        "open_at_the_kill": still_open,
        "started_s": started_s,
        "normal_s": normal_s,
        "recovery_s": recovery_s,
        "ratio": recovery_s / still_open / (normal_s / sagas),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--port", type=int, required=True, help="the participant's")
    parser.add_argument("--sagas", type=int, required=True)
    parser.add_argument("--worker", action="store_true", help="be the worker of a measurement")
    given = parser.parse_args()
    trio.run(run_worker if given.worker else main, given)
