"""A world for the engine: participants written down as data, a store that can be held or lost, a clock that is virtual.

Time is Trio's virtual one (`autojump_clock`); everything here counts in seconds since the world was made. The store is
the real SQLite store in memory. What a participant does is looked up by step and action:

    World({"pay": [refuse("UNAVAILABLE"), ok()], "undo pay": [hang()]})

Each call of the same idempotency key takes the next behaviour of the list, the last one for ever; without an entry a
step is done at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import trio

from saga.catalog import Catalog
from saga.errors import Unavailable
from saga.meter import Meter
from saga.model import Json, Saga, SagaStatus, StepAction, StepLog
from saga.payload_mask import NOTHING, PayloadMask
from saga.ports import Answer, Claimed, NewSaga, Outcome, StepCall, Store
from saga.runner import Engine, SagaRun
from saga.service import SagaService
from saga.supervisor import Limits, Supervisor
from saga.watchers import Watchers
from saga.workflow import Workflow, WorkflowDefinition
from store.sqlite import open_sqlite

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""The instant at which every virtual clock begins."""


class VirtualClock:
    """`saga.ports.Clock` by Trio's clock."""

    def __init__(self) -> None:
        self._origin = trio.current_time()

    def seconds(self) -> float:
        return trio.current_time() - self._origin

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.seconds())


# --- what a participant can do ---------------------------------------------------------------------------------------


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """One reaction to one call. `times`: how often the request arrives; `answer` None: never answers."""

    answer: Answer | None = None
    after_secs: float = 0.0
    works: bool = False
    times: int = 1
    bug: Exception | None = None


def ok(response: Json | None = None, *, after_secs: float = 0.0) -> Behaviour:
    return Behaviour(answer=Answer(outcome=Outcome.DONE, response=response or {}), after_secs=after_secs, works=True)


def late(after_secs: float) -> Behaviour:
    """Does it, and says so after that time."""
    return ok(after_secs=after_secs)


def refuse(code: str = "FAILED_PRECONDITION", message: str = "no", *, after_secs: float = 0.0) -> Behaviour:
    return Behaviour(answer=Answer(outcome=Outcome.REFUSED, code=code, message=message), after_secs=after_secs)


def retry_info(secs: float) -> Behaviour:
    """Refuses for now and asks for a pause."""
    return Behaviour(
        answer=Answer(outcome=Outcome.REFUSED, code="RESOURCE_EXHAUSTED", message="busy", retry_after_secs=secs)
    )


def unreachable() -> Behaviour:
    """The call never left."""
    return Behaviour(answer=Answer(outcome=Outcome.NOT_DONE, code="UNAVAILABLE", message="connection refused"))


def hang(*, works: bool = False) -> Behaviour:
    """Never answers; `works`: but does it."""
    return Behaviour(works=works)


def lose_reply() -> Behaviour:
    """Does it, and the answer is lost on the way."""
    return Behaviour(answer=Answer(outcome=Outcome.UNKNOWN, code="UNAVAILABLE", message="connection lost"), works=True)


def twice() -> Behaviour:
    """The network delivers the request two times."""
    return Behaviour(answer=Answer(outcome=Outcome.DONE, response={}), works=True, times=2)


def bug() -> Behaviour:
    """The caller itself breaks: what must never happen, and must not spread when it does."""
    return Behaviour(bug=ZeroDivisionError("a bug of ours"))


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One call as it arrived; `at` in seconds of the world, `ended` None while it has no answer."""

    call: StepCall
    at: float

    @property
    def what(self) -> str:
        return _name(self.call)


def _name(call: StepCall) -> str:
    return call.step_name if call.action is StepAction.EXECUTE else f"undo {call.step_name}"


class World:
    """All participants; keeps `saga.ports.StepCaller`.

    `seen`: every call in order. `effects`: how often each idempotency key took effect; an idempotent participant, as
    asked for by the contract, so never more than once. `cut_off`: what was in flight when its call was cancelled, and
    when. `most_at_once`: the largest number of calls in flight.
    """

    def __init__(self, script: Mapping[str, Sequence[Behaviour]] | None = None) -> None:
        self.clock = VirtualClock()
        self.script = dict(script or {})
        self.seen: list[Seen] = []
        self.effects: Counter[str] = Counter()
        self.cut_off: list[tuple[str, float]] = []
        self.in_flight = 0
        self.most_at_once = 0
        self._calls_of: Counter[str] = Counter()
        self._arrived = trio.lowlevel.ParkingLot()

    async def call(self, call: StepCall) -> Answer:
        what = _name(call)
        self.seen.append(Seen(call=call, at=self.clock.seconds()))
        turn = self._calls_of[call.idempotency_key]
        self._calls_of[call.idempotency_key] += 1
        self._arrived.unpark_all()
        behaviours = self.script.get(what) or [ok()]
        behaviour = behaviours[min(turn, len(behaviours) - 1)]
        self.in_flight += 1
        self.most_at_once = max(self.most_at_once, self.in_flight)
        try:
            return await self._behave(behaviour, call)
        except trio.Cancelled:
            self.cut_off.append((what, self.clock.seconds()))
            raise
        finally:
            self.in_flight -= 1

    async def _behave(self, behaviour: Behaviour, call: StepCall) -> Answer:
        if behaviour.bug is not None:
            raise behaviour.bug
        if behaviour.works:
            for _ in range(behaviour.times):
                if call.idempotency_key not in self.effects:
                    self.effects[call.idempotency_key] += 1
        if behaviour.answer is None:
            await trio.sleep_forever()
        await trio.sleep(behaviour.after_secs)
        assert behaviour.answer is not None
        return behaviour.answer

    async def until_called(self, what: str, times: int = 1) -> None:
        """Returns once there were that many calls of a step (`pay`) or its compensation (`undo pay`)."""
        while sum(seen.what == what for seen in self.seen) < times:
            await self._arrived.park()

    @property
    def story(self) -> list[tuple[str, float]]:
        """Every call in order: what and when."""
        return [(seen.what, seen.at) for seen in self.seen]

    @property
    def order(self) -> list[str]:
        return [seen.what for seen in self.seen]


# --- a store that can be held or lost --------------------------------------------------------------------------------

Hook = Callable[..., Awaitable[None]]


class InterposedStore:
    """A real store behind a door: `away` shuts it; `before` and `after` run, by method name, around a call with its
    arguments or its result, and may wait or raise."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.away = False
        self.before: dict[str, Hook] = {}
        self.after: dict[str, Hook] = {}
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)

        async def through(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            if self.away:
                await trio.lowlevel.checkpoint()
                raise Unavailable("the database is away")
            if (hook := self.before.get(name)) is not None:
                await hook(*args, **kwargs)
            result = await method(*args, **kwargs)
            if (hook := self.after.get(name)) is not None:
                await hook(result)
            return result

        return through

    @property
    def port(self) -> Store:
        """Itself, as what it stands for."""
        return cast(Store, self)


class CountingMeter(Meter):
    """Counts what the engine tells it, by name and main label."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def saga_started(self, workflow_name: str) -> None:
        self.counts["started"] += 1

    def saga_ended(self, workflow_name: str, status: SagaStatus, seconds: float) -> None:
        self.counts[f"ended {status}"] += 1

    def attempt_made(self, action: StepAction, service: str, method: str, code: str, seconds: float) -> None:
        self.counts[f"{action} {code}"] += 1

    def compensation_failed(self, workflow_name: str) -> None:
        self.counts["compensation failed"] += 1

    def lease_lost(self) -> None:
        self.counts["lease lost"] += 1

    def saga_crashed(self) -> None:
        self.counts["crashed"] += 1

    def sagas_removed(self, count: int) -> None:
        self.counts["removed"] += count


# --- workers ---------------------------------------------------------------------------------------------------------


class Worker:
    """One worker over a store: what `server/` wires, with a world for participants."""

    def __init__(
        self,
        store: Store,
        world: World,
        *,
        name: str = "w1",
        limits: Limits | None = None,
        park_after_secs: float = 30.0,
        max_payload_bytes: int = 10_000,
        services: Collection[str] = ("svc",),
        payload_mask: PayloadMask = NOTHING,
    ) -> None:
        self.store = store
        self.world = world
        self.watchers = Watchers()
        self.meter = CountingMeter()
        self.catalog = Catalog(store)
        self.engine = Engine(
            store=store,
            caller=world,
            clock=world.clock,
            watchers=self.watchers,
            meter=self.meter,
            draw=lambda: 0.0,
            park_after_secs=park_after_secs,
        )
        self.supervisor = Supervisor(self.engine, self.catalog, name, limits or Limits(), services)
        self.service = SagaService(
            store,
            self.supervisor,
            self.catalog,
            self.watchers,
            world.clock,
            services=services,
            max_payload_bytes=max_payload_bytes,
            meter=self.meter,
            payload_mask=payload_mask,
        )

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[Worker]:
        """Runs the worker for the block; leaving it is a crash: nothing is said to anybody."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.supervisor.run)
            yield self
            nursery.cancel_scope.cancel()

    async def end_of(self, saga_id: str, within_secs: float = 10_000.0) -> Saga:
        """The saga once it is terminal."""
        saga = (await self.service.get(saga_id, wait_secs=within_secs)).saga
        assert saga.status.is_terminal, saga
        return saga


@asynccontextmanager
async def memory_store(
    world: World, *definitions: WorkflowDefinition, events: bool = True
) -> AsyncIterator[InterposedStore]:
    """The real store in memory on the world's clock, with these workflows in it."""
    async with open_sqlite(":memory:", events=events, clock=world.clock) as store:
        interposed = InterposedStore(store)
        for definition in definitions:
            await interposed.port.register_workflow(definition, "")
        yield interposed


def saga_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


async def lone_run(
    store: Store,
    world: World,
    definition: WorkflowDefinition,
    *,
    payload: Json | None = None,
    number: int = 1,
    **engine: Any,
) -> SagaRun:
    """A run of a new saga owned by worker `w1`, without any supervisor."""
    worker = Worker(store, world, **engine)
    registered = await store.register_workflow(definition, "")
    await store.register_worker("w1", 1_000_000.0)
    created = await store.create(
        NewSaga(
            saga_id=saga_id(number),
            workflow_name=definition.name,
            workflow_version=registered.version,
            payload=payload or {},
            owner="w1",
        )
    )
    workflow = Workflow(definition=definition, version=registered.version)
    return SagaRun(worker.engine, Claimed(saga=created.saga), workflow)


def told(logs: Sequence[StepLog]) -> list[str]:
    """Step logs as lines: `pay EXECUTE SUCCESS x1`."""
    return [f"{log.step_name} {log.action} {log.status} x{log.attempts}" for log in logs]


def seconds_of(instant: datetime | None) -> float:
    """An instant as seconds of the world."""
    assert instant is not None
    return (instant - EPOCH).total_seconds()
