"""The outbox on every store: what is pending, what becomes of it, and how relays share it on Postgres."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import pytest
import trio

from bridge import open_loop
from saga.model import EventType, SagaStatus
from saga.ports import Store
from store.cloudevents import message_of
from store.outbox import Bell, DeadMessage, Outbox, Settled, fair_share
from store.postgres import PostgresStore, open_postgres
from store.sqlite import SqliteStore
from tests.store.samples import Database, StandingClock, created, event, move

RELAY = "relay-1"
MUCH = 1 << 30
LEASE_SECS = 15.0


@pytest.fixture(params=["postgres", "sqlite_file", "sqlite_memory"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """The stores that have a relay; the simulated one ends at the rows."""
    kind: str = request.param
    if kind == "postgres":
        return Database(kind, request.getfixturevalue("postgres_dsn"))
    return Database(kind, ":memory:" if kind == "sqlite_memory" else str(tmp_path / "saga.db"))


@pytest.fixture
async def outbox(store: Store) -> Outbox:
    """The outbox of a store, all of it shared out to RELAY."""
    assert isinstance(store, PostgresStore | SqliteStore)
    await store.outbox.take_share(RELAY, LEASE_SECS)
    return store.outbox


async def announced(store: Store, *types: EventType, **changes: object) -> str:
    """The id of a saga that has announced its start and these."""
    saga = await created(store, **changes)
    events = tuple(event(one, SagaStatus.RUNNING, number, f"e{number}") for number, one in enumerate(types, start=1))
    await store.record(move(saga, status=SagaStatus.RUNNING, events=events))
    return saga.saga_id


async def test_pending_events_come_in_order_with_all_that_their_messages_say(store: Store, outbox: Outbox) -> None:
    saga_id = await announced(
        store,
        EventType.SAGA_RUNNING,
        EventType.SAGA_FAILED,
        payload={"name": "Zoë"},
        correlation_id="c",
        initiated_by="web",
        workflow_version=3,
    )
    first, second, third = await outbox.pending(RELAY, limit=10, max_bytes=MUCH)
    assert first.id < second.id < third.id
    assert len({first.event_id, second.event_id, third.event_id}) == 3
    for number, one in enumerate((first, second, third)):
        assert (one.saga_id, one.workflow_name, one.workflow_version) == (saga_id, "order", 3)
        assert (one.correlation_id, one.initiated_by, one.current_step) == ("c", "web", number)
        assert uuid.UUID(one.event_id)
        assert one.created_at.tzinfo is not None
    assert [one.event_type for one in (first, second, third)] == ["SAGA_STARTED", "SAGA_RUNNING", "SAGA_FAILED"]
    assert [one.error_message for one in (first, second, third)] == [None, "e1", "e2"]
    assert "Zoë" in first.payload
    # Asked again they are the same, down to their ids: what is sent twice can be told.
    assert await outbox.pending(RELAY, limit=10, max_bytes=MUCH) == [first, second, third]


async def test_a_pass_is_bounded_in_events_and_in_bytes(store: Store, outbox: Outbox) -> None:
    for _ in range(40):
        await announced(store, payload={"much": "x" * 1000})
    everything = await outbox.pending(RELAY, limit=1000, max_bytes=MUCH)
    assert len(everything) == 40
    assert await outbox.pending(RELAY, limit=7, max_bytes=MUCH) == everything[:7]
    # The one that exceeds the bound is the last; there is always one.
    assert await outbox.pending(RELAY, limit=1000, max_bytes=5500) == everything[:6]
    assert await outbox.pending(RELAY, limit=1000, max_bytes=1) == everything[:1]


async def test_what_is_published_does_not_come_again_and_its_row_stays(
    store: Store, outbox: Outbox, database: Database
) -> None:
    saga_id = await announced(store, EventType.SAGA_RUNNING, EventType.SAGA_COMPLETED)
    first, second, third = await outbox.pending(RELAY, limit=10, max_bytes=MUCH)
    for _ in range(2):
        await outbox.settle(Settled(published=(first.id, second.id)))
        assert await outbox.pending(RELAY, limit=10, max_bytes=MUCH) == [third]
    await outbox.settle(Settled(published=(third.id,)))
    assert await outbox.pending(RELAY, limit=10, max_bytes=MUCH) == []
    assert len(database.outbox(store, saga_id)) == 3


async def test_what_is_refused_is_laid_aside_with_the_reason_and_kept_when_its_saga_is_gone(
    store: Store, outbox: Outbox, database: Database
) -> None:
    saga_id = await announced(store, EventType.SAGA_RUNNING)
    first, second = await outbox.pending(RELAY, limit=10, max_bytes=MUCH)
    dead = (
        DeadMessage(id=first.id, topic="t", message='{"a": 1}', reason="too large"),
        DeadMessage(id=first.id, topic="t.dlq", message='{"a": 1}', reason="no such topic"),
        DeadMessage(id=second.id, topic="t.dlq", message="{}", reason="no such topic"),
    )
    for _ in range(2):
        await outbox.settle(Settled(removed=(first.id,), published=(second.id,), dead=dead))
    assert await outbox.pending(RELAY, limit=10, max_bytes=MUCH) == []
    assert [row[0] for row in database.outbox(store, saga_id)] == ["SAGA_RUNNING"]
    database.ask(store, "DELETE FROM saga.saga_states WHERE id = $1", saga_id)
    found = database.ask(
        store, "SELECT topic, message, reason, event_type FROM saga.outbox_dead WHERE saga_id = $1", saga_id
    )
    assert sorted(found) == [
        ("t", '{"a": 1}', "too large", "SAGA_STARTED"),
        ("t.dlq", '{"a": 1}', "no such topic", "SAGA_STARTED"),
        ("t.dlq", "{}", "no such topic", "SAGA_RUNNING"),
    ]


async def test_the_statement_of_the_documents_sends_what_was_laid_aside_once_more(postgres_dsn: str) -> None:
    text = (Path(__file__).parents[2] / "docs/semantics.md").read_text("utf-8")
    (statement,) = [
        block for block in re.findall(r"```sql\n(.*?)```", text, re.DOTALL) if "FROM saga.outbox_dead" in block
    ]
    database = Database("postgres", postgres_dsn)
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        await announced(store, EventType.SAGA_RUNNING, EventType.SAGA_COMPENSATION_FAILED)
        await store.outbox.take_share(RELAY, LEASE_SECS)
        events = await store.outbox.pending(RELAY, limit=10, max_bytes=MUCH)
        messages = [(one, message_of(one, topic)) for one in events for topic in ("t", "t.dlq")]
        dead = tuple(
            DeadMessage(id=one.id, topic=message.topic, message=message.value.decode(), reason="no")
            for one, message in messages
        )
        await store.outbox.settle(Settled(removed=tuple(one.id for one in events), dead=dead))
        assert await store.outbox.pending(RELAY, limit=10, max_bytes=MUCH) == []
        database.ask(store, statement)
        again = await store.outbox.pending(RELAY, limit=10, max_bytes=MUCH)
        # To the millisecond, as messages have it: the message made of it is the same, byte for byte.
        assert [message_of(one, "t") for one in again] == [message_of(one, "t") for one in events]


async def test_the_backlog_is_counted(store: Store, outbox: Outbox, clock: StandingClock) -> None:
    assert (await outbox.backlog(RELAY)).pending == 0
    assert (await outbox.backlog(RELAY)).oldest_secs == 0.0
    await announced(store, EventType.SAGA_RUNNING)
    clock.advance(90)
    backlog = await outbox.backlog(RELAY)
    assert backlog.pending == 2
    assert backlog.oldest_secs >= 90


async def test_the_bell_rings_for_committed_events_and_for_nothing_else(store: Store, outbox: Outbox) -> None:
    def has_rung(bell: Bell) -> bool:
        rung = bell._rung.is_set()
        bell.silence()
        return rung

    saga = await created(store)
    assert has_rung(outbox.bell)
    saga = (await store.record(move(saga, attempt=1))).saga
    assert not has_rung(outbox.bell)
    await store.record(move(saga, events=(event(EventType.SAGA_RUNNING, SagaStatus.RUNNING),)))
    assert has_rung(outbox.bell)


# --- sharing, on Postgres ---------------------------------------------------------------------------------------------


def test_shares_are_even_and_nobody_is_asked_for_more_than_is_over() -> None:
    owners: list[tuple[int, str | None]] = [(number, "a") for number in range(16)]
    assert fair_share("a", owners, 1) == ([], [])
    assert fair_share("a", owners, 3) == ([], list(range(6, 16)))
    assert fair_share("b", owners, 2) == ([], [])
    free: list[tuple[int, str | None]] = [(number, None) for number in range(16)]
    assert fair_share("b", free, 2) == (list(range(8)), [])
    assert fair_share("b", free, 20) == ([0], [])


async def test_relays_share_the_partitions_and_take_over_from_those_that_leave_or_die(postgres_dsn: str) -> None:
    clock = StandingClock()
    async with open_loop(), open_postgres(postgres_dsn, events=True, clock=clock) as store:
        outbox = store.outbox
        assert await outbox.take_share("a", LEASE_SECS) == 16
        # All is taken: the second waits until the first has given up what is over.
        assert await outbox.take_share("b", LEASE_SECS) == 0
        assert await outbox.take_share("a", LEASE_SECS) == 8
        assert await outbox.take_share("b", LEASE_SECS) == 8
        await outbox.leave("a")
        assert await outbox.take_share("b", LEASE_SECS) == 16
        assert await outbox.take_share("c", LEASE_SECS) == 0
        clock.advance(LEASE_SECS + 1)
        assert await outbox.take_share("c", LEASE_SECS) == 16


async def test_each_event_is_one_relays_and_all_events_of_a_saga_are_the_same_relays(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        for relay in ("a", "b", "a", "b"):
            await store.outbox.take_share(relay, LEASE_SECS)
        for _ in range(60):
            await announced(store, EventType.SAGA_RUNNING)
        of_a = await store.outbox.pending("a", limit=1000, max_bytes=MUCH)
        of_b = await store.outbox.pending("b", limit=1000, max_bytes=MUCH)
        assert len(of_a) + len(of_b) == 120
        assert of_a
        assert of_b
        assert not {one.saga_id for one in of_a} & {one.saga_id for one in of_b}
        assert [one.id for one in of_a] == sorted(one.id for one in of_a)
        backlogs = [await store.outbox.backlog(relay) for relay in ("a", "b")]
        assert [backlog.pending for backlog in backlogs] == [len(of_a), len(of_b)]


async def test_a_relay_whose_lease_has_ended_finds_nothing_until_it_has_a_share_again(postgres_dsn: str) -> None:
    clock = StandingClock()
    async with open_loop(), open_postgres(postgres_dsn, events=True, clock=clock) as store:
        await announced(store)
        await store.outbox.take_share("a", LEASE_SECS)
        clock.advance(LEASE_SECS / 2)
        await store.outbox.keep("a", LEASE_SECS)
        clock.advance(LEASE_SECS / 2 + 1)
        # Kept alive meanwhile: nothing is taken from it but what is over.
        assert await store.outbox.take_share("b", LEASE_SECS) == 0
        clock.advance(LEASE_SECS)
        assert await store.outbox.take_share("b", LEASE_SECS) == 16
        assert await store.outbox.pending("a", limit=10, max_bytes=MUCH) == []
        assert len(await store.outbox.pending("b", limit=10, max_bytes=MUCH)) == 1
        # What "a" had sent by then it may still note.
        (pending,) = await store.outbox.pending("b", limit=10, max_bytes=MUCH)
        await store.outbox.settle(Settled(published=(pending.id,)))
        await store.outbox.take_share("a", LEASE_SECS)
        assert await store.outbox.take_share("b", LEASE_SECS) == 8
        assert await store.outbox.take_share("a", LEASE_SECS) == 8


async def test_many_relays_that_share_at_once_have_each_partition_once(postgres_dsn: str) -> None:
    async with open_loop():
        shares = {}

        async def one(relay: str) -> None:
            async with open_postgres(postgres_dsn, events=True) as store:
                for _ in range(5):
                    shares[relay] = await store.outbox.take_share(relay, LEASE_SECS)
                # Nobody goes before everybody has had its turns.
                if len(shares) == 4:
                    everybody.set()
                await everybody.wait()
                await store.outbox.take_share(relay, LEASE_SECS)
                took_again.append(relay)
                if len(took_again) == 4:
                    all_again.set()
                await all_again.wait()
                shares[relay] = await store.outbox.take_share(relay, LEASE_SECS)

        everybody, all_again = trio.Event(), trio.Event()
        took_again: list[str] = []
        async with trio.open_nursery() as nursery:
            for relay in "abcd":
                nursery.start_soon(one, relay)
        assert shares == dict.fromkeys("abcd", 4)
