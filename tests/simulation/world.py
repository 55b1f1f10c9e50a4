"""One run: workers over one store, clients, operators and misfortunes, all in one virtual time, all from one seed.

The workers are the product's own (runner, supervisor, transitions, service, catalog); simulated are the database behind
them, the network to it, the participants and the clients. A worker that crashes is cancelled where it stands; what it
had sent may land after its death, what it would have sent does not. Another one with a new name comes after a while.
"""

from __future__ import annotations

import logging
import types
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast
from unittest.mock import patch

import msgspec
import trio
from trio.testing import MockClock

import saga.service
from saga.catalog import Catalog
from saga.errors import Conflict, NotFound, Unavailable
from saga.model import Saga, SagaEvent
from saga.ports import Answer, Notice, StepCall
from saga.runner import Engine
from saga.service import SagaService, StartSaga
from saga.supervisor import Limits, Supervisor
from saga.uncancelled import uncancelled
from saga.watchers import Watchers
from saga.workflow import WorkflowDefinition
from store.outbox import Relay
from store.sqlite_connections import MEMORY, opened_connection
from store.sqlite_database import SqliteDatabase
from store.sqlite_migrations import migrate_up
from tests.simulation.audit import Audit
from tests.simulation.broker import TOPIC, Broker, SimulatedOutbox, SimulatedPublisher
from tests.simulation.chance import Chance, Climate, climate_of, workflows_of
from tests.simulation.door import Database, Door, Trouble
from tests.simulation.participants import Participants
from tests.simulation.tables import Tables
from tests.support.world import CountingMeter, VirtualClock

T = TypeVar("T")

EXCHANGE_SECS = 6.0
"""Longest an exchange with the database takes before its sender is told that it failed."""
LONGEST_SECS = 3600.0
"""Virtual time after the last trouble in which every saga has to end."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. `trace` stands for everything that happened in it, in order."""

    seed: int
    sagas: int
    attempts: int
    moves: int
    events: int
    virtual_secs: float
    faults: dict[str, int]
    ends: dict[str, int]
    violations: list[str]
    trace: str
    told: list[str] | None = None


class PublishedStates(Watchers):
    """Watchers of one worker; the audit sees what they are told."""

    def __init__(self, audit: Audit) -> None:
        super().__init__()
        self._audit = audit

    def publish(self, path: tuple[Saga, ...], stored: Saga) -> None:
        self._audit.published(stored)
        super().publish(path, stored)


class Worker:
    """One process of the product, from its start to its crash or stop."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.stops = False
        self.scope = trio.CancelScope()
        self.door = Door(world.database, worker_id=name, nursery=world.nursery, weather=world, watcher=world.audit)
        self.relay: Relay | None = None
        if world.climate.relays and isinstance(world.database, Tables):
            self.relay = Relay(
                SimulatedOutbox(world.database, self),
                SimulatedPublisher(world, self),
                relay_id=name,
                topic=TOPIC,
                lease_secs=world.climate.lease_secs,
                batch_events=50,
            )
        self.dies_in: int | None = None
        """How many more exchanges and calls it makes before it crashes."""
        self.meter = CountingMeter()
        watchers = PublishedStates(world.audit)
        catalog = Catalog(self.door)
        engine = Engine(
            store=self.door,
            caller=self,
            clock=world.clock,
            watchers=watchers,
            meter=self.meter,
            draw=world.chance.dice.random,
            park_after_secs=world.climate.park_after_secs,
        )
        limits = Limits(
            max_concurrent=world.climate.max_concurrent, lease_secs=world.climate.lease_secs, shutdown_grace_secs=3.0
        )
        self.supervisor = Supervisor(engine, catalog, name, limits)
        self.service = SagaService(
            self.door, self.supervisor, catalog, watchers, world.clock, services={"shop"}, max_payload_bytes=10_000
        )

    async def call(self, call: StepCall) -> Answer:
        return await self.world.participants.call(self, call)

    async def live(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until it crashed or has stopped. Ready when it can be asked."""
        with self.scope:
            async with trio.open_nursery() as helpers:
                if self.relay is not None:
                    await helpers.start(self.relay.run)
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.supervisor.run)
                    task_status.started()
                # As in the server: the relay ends last, so that it tells what was moved on the way out.
                helpers.cancel_scope.cancel()

    def crash(self) -> None:
        if not self.dead:
            self.dead = True
            self.world.chance.fault("worker crashed", self.name)
            self.door.die()
            self.scope.cancel()

    async def ask(self, say: Callable[..., Awaitable[T]], *args: object) -> T | None:
        """A client's request, as the front doors make it; None: no answer, or that the database is away."""
        if self.dead:
            return None
        try:
            answer = await uncancelled(say, *args)
        except Unavailable:
            return None
        return None if self.dead else answer


class World:
    """One run. `run` is all there is to call."""

    def __init__(
        self,
        seed: int,
        sagas: int,
        *,
        real_sql: bool = False,
        tell: bool = False,
        change: Callable[[Climate], Climate] | None = None,
    ) -> None:
        """`real_sql`: the tables are those of the embedded store, in memory. `tell`: keep the trace as text. `change`:
        what to make of the climate the seed gives."""
        self.seed = seed
        self._sagas = sagas
        self._real_sql = real_sql
        self.chance = Chance(seed)
        if tell:
            self.chance.told = []
        climate = climate_of(self.chance.dice, sagas)
        self.climate = climate if change is None else change(climate)
        self.workers: list[Worker] = []
        self.audit = Audit(self)
        self.participants = Participants(self)
        self.broker = Broker(self)
        self.calm = False
        self._away_until = 0.0
        self._names = 0
        self._clients = 0
        self._definitions: dict[tuple[str, int], WorkflowDefinition] = {}
        self.crashed_sagas = 0

    # --- the parts ---------------------------------------------------------------------------------------------------

    def definition(self, name: str, version: int) -> WorkflowDefinition:
        return self._definitions[name, version]

    def events_of(self, saga_id: str) -> list[SagaEvent]:
        database = self.database
        if isinstance(database, Tables):
            return [announced.event for announced in database.outbox[saga_id]]
        assert isinstance(database, SqliteDatabase)
        found = database._connection.execute(
            "SELECT event_type, status, current_step, error_message FROM outbox WHERE saga_id = ? ORDER BY id",
            [saga_id],
        ).fetchall()
        return [msgspec.convert(dict(row), SagaEvent) for row in found]

    def saga_ids(self) -> list[str]:
        if isinstance(self.database, Tables):
            return list(self.database.sagas)
        assert isinstance(self.database, SqliteDatabase)
        return [row[0] for row in self.database._connection.execute("SELECT id FROM saga_states ORDER BY created_at")]

    @contextmanager
    def _opened(self) -> Iterator[Database]:
        if not self._real_sql:
            yield Tables(self.clock)
            return
        with opened_connection(MEMORY) as connection:
            migrate_up(connection)
            yield cast(Database, SqliteDatabase(connection, self.clock, events=True))

    # --- the network to the database (`door.Weather`) ----------------------------------------------------------------

    def of_exchange(self, door: Door, name: str) -> Trouble | None:
        """What befalls the exchange that begins now; the worker may die of it."""
        worker = self._worker_of(door)
        dice, now = self.chance.dice, trio.current_time()
        if self.calm:
            return None
        if worker.dies_in is not None:
            worker.dies_in -= 1
            if worker.dies_in <= 0 and (worker.dies_in < 0 or dice.random() < 0.6):
                return self._die_at(worker, name)
        if now < self._away_until or now < door.cut_off_until:
            self.chance.fault("database: away", door.worker_id, name)
            return Trouble(lands_after=None, answered_after=dice.choice((0.01, 1.0, EXCHANGE_SECS)), lost=True)
        if dice.random() >= self.climate.store_trouble:
            return None
        kind = dice.randrange(5)
        if kind == 0:
            self.chance.fault("database: slow", door.worker_id, name)
            there = dice.uniform(0.0, 1.0)
            return Trouble(lands_after=there, answered_after=there + dice.uniform(0.0, 1.0), lost=False)
        if kind == 1:
            self.chance.fault("database: very slow", door.worker_id, name)
            there = dice.uniform(0.0, EXCHANGE_SECS)
            return Trouble(lands_after=there, answered_after=EXCHANGE_SECS, lost=False)
        if kind == 2:
            self.chance.fault("database: request lost", door.worker_id, name)
            return Trouble(lands_after=None, answered_after=0.05, lost=True)
        if kind == 3:
            self.chance.fault("database: reply lost", door.worker_id, name)
            return Trouble(lands_after=0.01, answered_after=0.05, lost=True)
        # Its sender is told that it failed, and then it lands.
        self.chance.fault("database: lands after it failed", door.worker_id, name)
        late = dice.uniform(0.0, min(EXCHANGE_SECS, self.climate.lease_secs) * 0.9)
        return Trouble(lands_after=0.05 + late, answered_after=0.05, lost=True)

    def after_exchange(self, door: Door, name: str) -> None:
        self.chance.note(door.worker_id, name)
        worker = self._worker_of(door)
        if worker.dies_in == 0 and not self.calm:
            # It is stored, and whoever asked for it never learns.
            self.chance.fault("crash: after a write", door.worker_id, name)
            worker.crash()

    def lands_although_dead(self) -> bool:
        return self.chance.dice.random() < 0.5

    def landed_late(self, door: Door, name: str) -> None:
        """A write landed whose sender had been told that it failed, or had given it up."""
        self.chance.note("landed late", door.worker_id, name)

    def of_notice(self, door: Door, notice: Notice) -> None:
        """What the others hear of a write, at once, late or never."""
        dice = self.chance.dice
        for worker in self.workers:
            if worker.door is door or worker.dead:
                continue
            roll = dice.random()
            if self.calm or roll < 0.7:
                worker.door.hear(notice)
            elif roll < 0.9:
                self.nursery.start_soon(self._hear_late, worker, notice)
            else:
                self.chance.faults["notice lost"] += 1

    async def _hear_late(self, worker: Worker, notice: Notice) -> None:
        await trio.sleep(self.chance.dice.uniform(0.0, 2.0))
        worker.door.hear(notice)

    def _worker_of(self, door: Door) -> Worker:
        return self._by_door[door]

    def _die_at(self, worker: Worker, name: str) -> Trouble | None:
        if self.chance.dice.random() < 0.4:
            self.chance.fault("crash: before a write", worker.name, name)
            worker.crash()
            return None
        self.chance.fault("crash: during a write", worker.name, name)
        self.nursery.start_soon(self._crash_in, worker, 0.1)
        lands = self.chance.dice.choice((0.05, 0.2, self.climate.lease_secs + 3.0))
        return Trouble(lands_after=lands, answered_after=lands + 0.2, lost=False)

    def may_die(self, worker: Worker, *, before: bool) -> None:
        """A call of this worker is about to leave, or has just been acted on."""
        if worker.dies_in is None or self.calm or worker.dead:
            return
        worker.dies_in -= before
        if worker.dies_in < 0 or (worker.dies_in == 0 and (not before or self.chance.dice.random() < 0.5)):
            self.chance.fault("crash: before a call" if before else "crash: after a call", worker.name)
            worker.crash()

    async def _crash_in(self, worker: Worker, secs: float) -> None:
        await trio.sleep(secs)
        worker.crash()

    # --- misfortunes -------------------------------------------------------------------------------------------------

    async def _misfortunes(self) -> None:
        """Crashes at an await and at an instant, stops, cut lines and outages, all over the time of the traffic."""
        dice, secs = self.chance.dice, self.climate.traffic_secs
        for at in sorted(dice.uniform(0.0, secs + 10.0) for _ in range(self.climate.misfortunes)):
            await trio.sleep_until(self._began + at)
            kind = dice.randrange(9 if self.climate.relays else 8)
            if kind == 0:
                self.chance.fault("database down")
                self._away_until = trio.current_time() + dice.choice((0.5, 3.0, 20.0))
                continue
            if kind == 8:
                self.chance.fault("broker away")
                self.broker.away_until = trio.current_time() + dice.choice((1.0, 5.0, 30.0))
                continue
            live = [worker for worker in self.workers if not (worker.dead or worker.stops)]
            if not live:
                continue
            worker = dice.choice(live)
            if kind == 1:
                self.chance.fault("lease lost: cut off", worker.name)
                worker.door.cut_off_until = trio.current_time() + dice.uniform(0.5, 2.0) * self.climate.lease_secs
            elif kind == 2:
                self.chance.fault("worker stopped", worker.name)
                self.nursery.start_soon(self._stop, worker)
            elif kind == 3:
                self.chance.fault("crash: at an instant", worker.name)
                worker.crash()
            else:
                worker.dies_in = dice.randint(0, 60)

    async def _stop(self, worker: Worker) -> None:
        """SIGTERM: drained, then gone."""
        worker.stops = True
        await worker.supervisor.drain()

    async def _place(self) -> None:
        """One place for a worker: a new process whenever the last has gone, until the run is over."""
        while not self._over:
            self._names += 1
            worker = Worker(self, f"worker-{self._names}")
            self._by_door[worker.door] = worker
            async with trio.open_nursery() as nursery:
                await nursery.start(worker.live)
                self.workers.append(worker)
            if worker in self.workers:
                self.workers.remove(worker)
            self.crashed_sagas += worker.meter.counts["crashed"]
            if worker.meter.counts["crashed"]:
                self.audit.breach("an error of our own", worker.name)
            worker.dead = True
            await trio.sleep(self.chance.dice.uniform(0.0, 5.0))

    # --- clients -----------------------------------------------------------------------------------------------------

    async def _somebody(self) -> Worker:
        """A worker that takes requests."""
        while True:
            live = [worker for worker in self.workers if not (worker.dead or worker.stops)]
            if live:
                return self.chance.dice.choice(live)
            await trio.sleep(0.5)

    async def _traffic(self) -> None:
        dice = self.chance.dice
        at = 0.0
        for number in range(self._sagas):
            at += dice.random() * 2 * self.climate.traffic_secs / self._sagas
            await trio.sleep_until(self._began + at)
            self._clients += 1
            self.nursery.start_soon(self._client, number)

    async def _client(self, number: int) -> None:
        dice, climate = self.chance.dice, self.climate
        twice = dice.random() < climate.duplicates
        key = f"key-{number}" if twice or dice.random() < 0.5 else None
        request = StartSaga(
            workflow_name=f"w{dice.randrange(4)}", payload={"order": number}, initiated_by="client", idempotency_key=key
        )
        try:
            if twice:
                self.chance.faults["client: duplicate request"] += 1
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._start, request, number)
                    await self._start(request, number)
            saga_id = await self._start(request, number)
            if saga_id is None:
                return
            if key is not None and dice.random() < 0.05:
                await self._conflict(request)
            if dice.random() < climate.watchers:
                await self._watch(saga_id)
            if dice.random() < climate.cancels:
                await trio.sleep(dice.choice((0.0, 0.05, 0.5, 2.0, 10.0)))
                await self._cancel(saga_id)
        finally:
            self._clients -= 1

    async def _start(self, request: StartSaga, number: int) -> str | None:
        """The id of the saga a client was answered with; without a key it asks once, with one until it knows."""
        while True:
            worker = await self._somebody()
            if self.chance.dice.random() < 0.02:
                self.chance.fault("client: gone in the middle of a request", number)
                with trio.move_on_after(self.chance.dice.choice((0.0, 0.02))):
                    await worker.ask(worker.service.start, request)
                if request.idempotency_key is None:
                    return None
                continue
            started = await worker.ask(worker.service.start, request)
            if started is not None:
                self.audit.accepted(started.saga.saga_id, number, request.idempotency_key)
                return started.saga.saga_id
            if request.idempotency_key is None:
                return None
            await trio.sleep(0.3)

    async def _conflict(self, request: StartSaga) -> None:
        worker = await self._somebody()
        other = msgspec.structs.replace(request, payload={"order": -1})
        self.chance.faults["client: key used again for another request"] += 1
        try:
            if await worker.ask(worker.service.start, other) is not None:
                self.audit.breach("a key was taken for two requests", request.idempotency_key)
        except Conflict:
            pass

    async def _watch(self, saga_id: str) -> None:
        worker = await self._somebody()
        last: Saga | None = None
        try:
            with trio.move_on_after(60), worker.service.watch(saga_id) as watch:
                while (saga := await watch.next()) is not None:
                    self.audit.published(saga)
                    if last is not None and (saga.revision < last.revision or last.status.is_terminal):
                        self.audit.breach("a watcher was told of the past", saga_id, last.status, saga.status)
                    last = saga
        except Unavailable:
            pass
        except NotFound:
            self.audit.breach("a saga that was answered 201 is not known", saga_id)

    async def _cancel(self, saga_id: str) -> None:
        self.chance.fault("client: cancel", saga_id)
        self.audit.cancel_sent(saga_id)
        for _ in range(50):
            worker = await self._somebody()
            try:
                if await worker.ask(worker.service.cancel, saga_id) is not None:
                    self.audit.cancel_answered(saga_id)
                    return
            except Conflict:
                self.audit.cancel_refused(saga_id)
                return
            except NotFound:
                self.audit.breach("a saga that was answered 201 is not known", saga_id)
                return
            await trio.sleep(0.3)

    async def _operate(self) -> None:
        """An operator runs most of the failed undos again."""
        for saga_id in self.saga_ids():
            row = self.database.get(saga_id)
            if row is not None and row.undo_failed and row.status.is_terminal and self.chance.dice.random() < 0.7:
                worker = await self._somebody()
                self.chance.fault("operator: compensation run again", saga_id)
                try:
                    await worker.ask(worker.service.retry_compensation, saga_id)
                except Conflict:
                    pass

    # --- the run -----------------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self.clock = VirtualClock()
        self._began = trio.current_time()
        self._over = False
        self._by_door: dict[Door, Worker] = {}
        with self._opened() as self.database:
            for definition in workflows_of(self.chance.dice):
                version = self.database.register_workflow(definition, "").version
                self._definitions[definition.name, version] = definition
            async with trio.open_nursery() as self.nursery:
                for _ in range(self.climate.workers):
                    self.nursery.start_soon(self._place)
                self.nursery.start_soon(self._misfortunes)
                await self._traffic()
                await trio.sleep_until(self._began + self.climate.traffic_secs + 12.0)
                for round_of_undos in range(3):
                    if round_of_undos:
                        await self._operate()
                        await trio.sleep(3.0)
                    if round_of_undos == 1:
                        self._calm_down()
                    await self._until(self._all_ended)
                if not self.audit.violations:
                    await trio.sleep(20.0)  # what is still on its way to a participant
                    await self._until(self._all_published)
                    await self._stop_all()
                    self.audit.close(self.saga_ids())
                    self.audit.close_log(self.database)
                    if self.climate.relays and isinstance(self.database, Tables):
                        self.audit.close_events(self.database, self.broker)
                self.nursery.cancel_scope.cancel()
        self.virtual_secs = trio.current_time() - self._began

    def _calm_down(self) -> None:
        self.calm = True
        self._away_until = 0.0

    async def _until(self, over: Callable[[], bool]) -> None:
        """Waits in virtual time, not for ever: whoever waits in vain is left to the audit."""
        for _ in range(int(LONGEST_SECS)):
            if over() or self.audit.violations:
                return
            await trio.sleep(1.0)

    def _all_ended(self) -> bool:
        return not self._clients and not self.database.count_open()

    def _all_published(self) -> bool:
        tables = self.database
        return not (self.climate.relays and isinstance(tables, Tables) and any(tables.unpublished))

    async def _stop_all(self) -> None:
        self._over = True
        for worker in list(self.workers):
            if not worker.dead:
                await self._stop(worker)

    def run(self) -> Outcome:
        """The whole run, in a Trio of its own."""
        with deterministic(self.seed):
            trio.run(self._main, clock=MockClock(autojump_threshold=0))
        ends = Counter(self.database_statuses)
        return Outcome(
            seed=self.seed,
            sagas=len(self.audit.trails),
            attempts=self.audit.attempts,
            moves=self.audit.moves,
            events=self.audit.events,
            virtual_secs=self.virtual_secs,
            faults=dict(self.chance.faults),
            ends=dict(ends),
            violations=self.audit.violations,
            trace=self.chance.trace,
            told=self.chance.told,
        )

    @property
    def database_statuses(self) -> Sequence[str]:
        return [str(trail.ended) for trail in self.audit.trails.values()]


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Trio's scheduler and the ids of new sagas follow from the seed as well, for the block; the log is silent."""
    scheduler = cast(Any, trio)._core._run
    ids = Chance(seed ^ 0x5A6A).dice
    seeded = types.SimpleNamespace(uuid4=lambda: uuid.UUID(int=ids.getrandbits(128), version=4))
    state = scheduler._r.getstate()
    level = logging.getLogger("saga").level
    with ExitStack() as undo:
        undo.callback(scheduler._r.setstate, state)
        undo.callback(logging.getLogger("saga").setLevel, level)
        undo.enter_context(patch.object(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True))
        undo.enter_context(patch.object(saga.service, "uuid", seeded))
        scheduler._r.seed(seed)
        logging.getLogger("saga").setLevel(logging.CRITICAL + 1)
        yield
