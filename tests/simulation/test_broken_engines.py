"""The engine is broken on purpose, one part at a time, and the simulation has to notice within so many sagas.

A check that nothing can fail proves nothing: each of these is a mistake somebody could make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import trio

import store.sqlite_database
from saga import transitions
from saga.errors import Unavailable
from saga.facts import Fact, StepRetried
from saga.model import EventType, SagaStatus
from saga.ports import Claimed, Created, NewSaga, Record, Recorded
from saga.runner import SagaRun
from saga.supervisor import Supervisor
from saga.transitions import _Draft, advance
from saga.workflow import Workflow
from store import rows
from store.cloudevents import Message
from store.outbox import Acknowledged, Outcome, Relay
from tests.simulation.campaign import SAGAS_IN_A_RUN
from tests.simulation.chance import Climate
from tests.simulation.door import Door
from tests.simulation.tables import Tables
from tests.simulation.world import World

SEED = 50


def rough(climate: Climate) -> Climate:
    """A run in which workers lose their sagas often."""
    return msgspec.structs.replace(climate, workers=4, lease_secs=2.0, store_trouble=0.1, misfortunes=20)


Break = Callable[[], AbstractContextManager[object]]


def rules_broken(broken: AbstractContextManager[object], within_sagas: int, *, real_sql: bool = False) -> set[str]:
    """The rules that the first run to break any of them breaks; empty: none did."""
    with broken:
        for seed in range(SEED, SEED + within_sagas // SAGAS_IN_A_RUN):
            violations = World(seed, SAGAS_IN_A_RUN, real_sql=real_sql, change=rough).run().violations
            if violations:
                return {violation.partition(":")[0] for violation in violations}
    return set()


# --- skip a fence ----------------------------------------------------------------------------------------------------


def without_owner_and_epoch() -> AbstractContextManager[object]:
    """A move lands wherever the revision fits, whoever owns the saga by now."""

    def fence_holds(stored: Any, record: Record) -> bool:
        ends = record.after.status in (SagaStatus.COMPLETED, SagaStatus.FAILED)
        return bool(stored.revision == record.before.revision and not (ends and stored.cancel_requested))

    return patch.object(Tables, "fence_holds", staticmethod(fence_holds))


def without_revision() -> AbstractContextManager[object]:
    """A move that is sent again lands again."""

    def fence_holds(stored: Any, record: Record) -> bool:
        return bool((stored.owner, stored.epoch) == (record.before.owner, record.before.epoch))

    return patch.object(Tables, "fence_holds", staticmethod(fence_holds))


def without_owner_and_epoch_in_sql() -> AbstractContextManager[object]:
    """The same in the SQL of the embedded store."""
    query = store.sqlite_database._Q["record_move"]
    text = query.text.replace("AND owner IS :owner_before", "").replace("AND epoch = :epoch_before", "")
    assert text != query.text
    queries = {**store.sqlite_database._Q, "record_move": replace(query, text=text)}
    return patch.object(store.sqlite_database, "_Q", queries)


def going_on_without_a_lease() -> AbstractContextManager[object]:
    """A worker that could not renew in time takes the lease anew and goes on with what it ran."""

    async def renew_and_go_on(self: Supervisor) -> None:
        while True:
            await trio.sleep(self._limits.lease_secs / 3)
            self._lease_ends = trio.current_time() + self._limits.lease_secs
            try:
                await self._engine.store.register_worker(self.worker_id, self._limits.lease_secs)
            except Unavailable:
                pass

    return patch.object(Supervisor, "_lease_loop", renew_and_go_on)


# --- drop an event ---------------------------------------------------------------------------------------------------


def dropping(event_type: EventType) -> AbstractContextManager[object]:
    announce = _Draft.announce

    def announce_all_but(self: _Draft, announced: EventType, *args: Any) -> None:
        if announced is not event_type:
            announce(self, announced, *args)

    return patch.object(_Draft, "announce", announce_all_but)


# --- swap the undo order ---------------------------------------------------------------------------------------------


def undoing_forwards() -> AbstractContextManager[object]:
    start_undo = _Draft.start_undo

    def start_undo_forwards(self: _Draft, *args: Any, **kwargs: Any) -> None:
        start_undo(self, *args, **kwargs)
        self.saga = msgspec.structs.replace(self.saga, undo_plan=tuple(sorted(self.saga.undo_plan)))
        self.path[-1] = self.saga

    return patch.object(_Draft, "start_undo", start_undo_forwards)


# --- forget an attempt -----------------------------------------------------------------------------------------------


def not_counting_retries() -> AbstractContextManager[object]:
    def step_retried_uncounted(self: _Draft, fact: StepRetried, status: SagaStatus) -> None:
        _Draft.step_retried(self, fact, status)
        self.saga = msgspec.structs.replace(self.saga, attempt=self.saga.attempt - 1)
        self.path[-1] = self.saga

    return patch.dict(transitions._APPLY, {StepRetried: step_retried_uncounted})


def counting_anew_after_a_claim() -> AbstractContextManager[object]:
    """What a worker did before it crashed, or before the saga was parked, is not counted by the next."""
    init = SagaRun.__init__

    def init_anew(self: SagaRun, engine: Any, claimed: Claimed, workflow: Workflow, **kwargs: Any) -> None:
        saga = claimed.saga
        if saga.attempt:
            saga = msgspec.structs.replace(saga, attempt=1)
        init(self, engine, msgspec.structs.replace(claimed, saga=saga), workflow, **kwargs)

    return patch.object(SagaRun, "__init__", init_anew)


# --- ack before commit -----------------------------------------------------------------------------------------------


@contextmanager
def answering_before_the_commit() -> Iterator[None]:
    """The store says that a write is durable, and writes it a moment later, if its process still lives then."""

    def write_later(door: Door, say: Callable[[], object]) -> None:
        async def later() -> None:
            await trio.sleep(0.02)
            if not door.dead:
                say()

        assert door._nursery is not None
        door._nursery.start_soon(later)

    async def create(self: Door, new: NewSaga) -> Created:
        row = rows.prepare_create(new)
        await trio.lowlevel.checkpoint()
        watcher = self._watcher
        assert watcher is not None
        write_later(self, lambda: watcher.create(self, row))
        return Created(saga=rows.new_saga_as_stored(new, clock_of(self).now()))

    async def record(self: Door, record: Record) -> Recorded:
        row = rows.prepare_move(record)
        await trio.lowlevel.checkpoint()
        watcher = self._watcher
        assert watcher is not None
        write_later(self, lambda: watcher.move(self, row))
        now = clock_of(self).now()
        landed = {"updated_at": now, "next_attempt_at": None, "deadline_at": record.before.deadline_at}
        return rows.moved_saga(row, {**landed, "cancel_requested": False}, lambda instant: instant)

    def clock_of(door: Door) -> Any:
        assert isinstance(door.database, Tables)
        return door.database._clock

    with patch.object(Door, "create", create), patch.object(Door, "record", record):
        yield


def noting_events_as_published_before_the_broker_has_them() -> AbstractContextManager[object]:
    publish = Relay._publish_messages

    async def publish_hopefully(self: Relay, messages: Sequence[Message], outcomes: list[Outcome]) -> None:
        await publish(self, messages, outcomes)
        outcomes[:] = [Acknowledged()] * len(outcomes)

    return patch.object(Relay, "_publish_messages", publish_hopefully)


def announcing_before_the_write() -> AbstractContextManager[object]:
    """The runner tells watchers of a state that is not stored yet."""
    write = SagaRun._write

    async def write_after_telling(self: SagaRun, fact: Fact) -> Any:
        record = advance(self.saga, self._definition, fact, self._engine.clock.now())
        self._engine.watchers.publish(record.path, record.after)
        return await write(self, fact)

    return patch.object(SagaRun, "_write", write_after_telling)


# --- the cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "within_sagas", "rule"),
    [
        pytest.param(without_owner_and_epoch, 4_000, "a write by a stale owner landed", id="fence: owner and epoch"),
        pytest.param(without_revision, 4_000, "a write by a stale owner landed", id="fence: revision"),
        pytest.param(
            going_on_without_a_lease, 4_000, "a call by a worker that does not own the saga", id="fence: lease"
        ),
        pytest.param(undoing_forwards, 200, "compensations are not in reverse, each once", id="undo order"),
        pytest.param(not_counting_retries, 200, "an attempt was forgotten or made twice", id="attempt: retry"),
        pytest.param(
            counting_anew_after_a_claim, 2_000, "a call that is not stored as due", id="attempt: after a claim"
        ),
        pytest.param(answering_before_the_commit, 200, "answered before it was stored", id="ack: store"),
        pytest.param(announcing_before_the_write, 200, "announced before it was stored", id="ack: watchers"),
        pytest.param(
            noting_events_as_published_before_the_broker_has_them,
            4_000,
            "events are missing at the broker, or out of order",
            id="ack: relay",
        ),
    ],
)
def test_a_broken_engine_is_caught(broken: Break, within_sagas: int, rule: str) -> None:
    assert rule in rules_broken(broken(), within_sagas)


@pytest.mark.parametrize("event_type", EventType)
def test_an_event_that_is_dropped_is_missed(event_type: EventType) -> None:
    if event_type is EventType.SAGA_STARTED:
        return  # written by the store with the creation; the shared suite of tests/store asks for it
    failed_undo = event_type is EventType.SAGA_COMPENSATION_FAILED
    rule = "failed compensations are not announced each once" if failed_undo else "the events do not tell what happened"
    assert rule in rules_broken(dropping(event_type), 1_000)


def test_a_fence_that_is_missing_in_sql_is_caught() -> None:
    rules = rules_broken(without_owner_and_epoch_in_sql(), 4_000, real_sql=True)
    assert "a write by a stale owner landed" in rules
