"""A worker at work over a store of its own in memory, and what tests ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from saga.errors import Invalid
from saga.facts import Fact
from saga.model import Saga
from saga.ports import NewSaga
from saga.service import StartSaga
from saga.transitions import advance
from saga.workflow import WorkflowDefinition
from tests.saga.samples import patient, step, workflow
from tests.support.world import Behaviour, InterposedStore, Worker, World, memory_store, saga_id, told

UNKNOWN_ID = "99999999-9999-4999-8999-999999999999"
THREE = workflow(step("a"), step("b"), step("c", retry=patient(3)), timeout_secs=None)


@asynccontextmanager
async def worker_of(
    script: dict[str, list[Behaviour]] | None, *definitions: WorkflowDefinition, **options: Any
) -> AsyncIterator[Worker]:
    """A worker at work over a store of its own."""
    world = World(script)
    async with memory_store(world, *definitions) as store:
        worker = Worker(store.port, world, **options)
        async with worker.at_work():
            yield worker


@asynccontextmanager
async def settled_worker_of(
    script: dict[str, list[Behaviour]] | None, *definitions: WorkflowDefinition, **options: Any
) -> AsyncIterator[Worker]:
    """A worker at work that has seen that no saga waits."""
    async with worker_of(script, *definitions, **options) as worker:
        await settle()
        yield worker


def store_of(worker: Worker) -> InterposedStore:
    """Its store, into which a test may step."""
    assert isinstance(worker.store, InterposedStore)
    return worker.store


async def start(worker: Worker, **request: Any) -> str:
    """Starts a saga of the workflow `order`."""
    started = await worker.service.start(StartSaga(workflow_name="order", **request))
    return started.saga.saga_id


async def waiting_saga(worker: Worker, number: int, version: int = 1) -> str:
    """A saga in the backlog, as if another worker had accepted it."""
    created = await worker.store.create(
        NewSaga(saga_id=saga_id(number), workflow_name="order", workflow_version=version, payload={})
    )
    return created.saga.saga_id


async def saga_of(worker: Worker, saga: str) -> Saga:
    found = await worker.store.get(saga)
    assert found is not None
    return found


async def logs_of(worker: Worker, saga: str) -> list[str]:
    return told(await worker.store.step_logs(saga))


def admitted(world: World) -> dict[float, set[str]]:
    """Which sagas made a call at each instant; within one instant Trio shuffles on purpose."""
    at: dict[float, set[str]] = {}
    for seen in world.seen:
        at.setdefault(seen.at, set()).add(seen.call.saga_id)
    return at


async def settle() -> None:
    """Lets everything happen that needs no time."""
    await trio.testing.wait_all_tasks_blocked()


async def bring_to(worker: Worker, facts: Sequence[Fact]) -> str:
    """A saga left by a worker that died there."""
    store, name = worker.store, "dead"
    await store.register_worker(name, 5.0)
    created = await store.create(
        NewSaga(saga_id=saga_id(1), workflow_name="order", workflow_version=1, payload={}, owner=name)
    )
    saga = created.saga
    for fact in facts:
        saga = (await store.record(advance(saga, THREE, fact, worker.world.clock.now()))).saga
    return saga.saga_id


def reasons(error: Invalid) -> list[tuple[str, str]]:
    return [(detail.field, detail.reason) for detail in error.details]
