"""SIGKILL at named points: in the middle of a load, at the very instant that the test waits for.

A worker that reaches participant, database and broker over lines which can be frozen one way, and a second one beside
it. What has got through, and what has not, is known when the kill comes: so each point is met for certain, without a
hook in the product. The second worker and the restarted first finish everything. Then the audit: every saga that was
answered has ended and there are no others, each effect is there once or undone, and every event is on the topic.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults.audit import (
    DOOMED,
    ENDS,
    GOOD,
    REFUSES,
    are_open,
    check_books,
    check_events,
    check_store,
    stored_events,
)
from tests.faults.load import Load, load, until
from tests.support.kafka import MockBroker, Reader, reader
from tests.support.line import Line, line_to
from tests.support.participants import Call, Participant, Script, participant
from tests.support.postgres import PostgresServer, ask
from tests.support.server_process import ServerProcess, server_process

LEASE_SECS = 1.5
WORK = {"once": True, "delay_secs": 0.03}
SCRIPT: Script = {"Insure": [REFUSES], "*": [WORK]}
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)

STANDS_STILL = """
    CREATE FUNCTION stand_still() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF (SELECT relay FROM saga.outbox_partitions WHERE id = OLD.relay_partition) LIKE '{victim}' THEN
            PERFORM pg_sleep(600);
        END IF;
        RETURN NEW;
    END;
    $$
"""


class House:
    """Two workers on one database, broker and participant, and the lines over which the first one reaches them."""

    def __init__(
        self,
        dsn: str,
        shop: Participant,
        lines: tuple[Line, Line, Line],
        workers: tuple[ServerProcess, ServerProcess],
        read: Reader,
    ) -> None:
        self.dsn = dsn
        self.shop = shop
        self.to_shop, self.to_database, self.to_broker = lines
        self.victim, self.other = workers
        self.read = read
        self.answered: dict[str, str] = {}
        """All sagas of all loads, by what clients were told."""

    @property
    def victims_name(self) -> str:
        """What its names are like in SQL."""
        return f"%-{self.victim.process.pid}-%"

    def kill(self) -> None:
        """Ends the first worker, and loses what was frozen on its lines."""
        self.victim.kill()
        for line in (self.to_shop, self.to_database, self.to_broker):
            line.cut()
            line.thaw()
            line.mend()

    def now(self) -> object:
        return ask(self.dsn, "SELECT clock_timestamp()")[0][0]

    def calls_of(self, key: str) -> list[Call]:
        return [call for call in self.shop.calls() if call.metadata["idempotency-key"] == key]

    def unsent(self, since: object = LONG_AGO) -> set[str]:
        """Events that were stored since then, in the part of the outbox that the victim relays, and are not noted as
        published."""
        found = ask(
            self.dsn,
            "SELECT o.event_id FROM saga.outbox o JOIN saga.outbox_partitions p ON p.id = o.relay_partition"
            " WHERE p.relay LIKE $1 AND o.published_at IS NULL AND o.created_at > $2",
            self.victims_name,
            since,
        )
        return {str(row[0]) for row in found}

    def on_the_topic(self) -> set[str]:
        return {one.event_id for one in self.read.rest()}


@pytest.fixture(scope="module")
def house(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with ExitStack() as stack:
        broker = MockBroker()
        stack.callback(broker.close)
        topic = broker.topic()
        shop = stack.enter_context(participant(flavour="grpcio", script=SCRIPT))
        dsn = stack.enter_context(postgres_server.cloned_database())
        broker_port = int(broker.bootstrap.rpartition(":")[2])
        to_shop, to_database = (stack.enter_context(line_to(port)) for port in (shop.port, postgres_server.port))
        to_broker = stack.enter_context(line_to(broker_port, stands_in=True))

        def worker(name: str, shop_port: int, database_port: int, broker_port: int) -> ServerProcess:
            folder: Path = tmp_path_factory.mktemp(name)
            config = {
                "services": {"shop": {**shop.settings(), "port": shop_port}},
                "saga": {"lease_secs": LEASE_SECS},
                "kafka": {"brokers": [f"127.0.0.1:{broker_port}"], "topics": {"publish": topic}},
            }
            env = {"DATABASE_URL": dsn.replace(f":{postgres_server.port}/", f":{database_port}/")}
            made = stack.enter_context(server_process(folder, config, env=env))
            made.spawn()
            return made

        victim = worker("victim", to_shop.port, to_database.port, to_broker.port)
        other = worker("other", shop.port, postgres_server.port, broker_port)
        other.until_ready()
        for workflow in (GOOD, DOOMED):
            other.register(workflow)
        read = stack.enter_context(reader(broker, topic))
        yield House(dsn, shop, (to_shop, to_database, to_broker), (victim, other), read)


# --- the points ------------------------------------------------------------------------------------------------------


def after_intent(house: House, _: Load) -> None:
    """Moves are stored, and the calls they stand for have not been sent."""
    house.to_shop.freeze("asks")
    since = house.now()
    until(lambda: len(next_calls(house, "RUNNING", since=since)) >= 3, house.victim)
    stored = next_calls(house, "RUNNING", since=since)
    house.kill()
    for key in stored:
        assert house.calls_of(key) == []


def after_commit(house: House, clients: Load) -> None:
    """The success of a step is stored, which its worker has not heard, and so the next step is not begun."""
    while not (stored := successes_nobody_heard_of(house, clients)):
        house.to_database.thaw()
    house.kill()
    for key in stored:
        assert key.endswith(":1:execute")
        assert house.calls_of(key) == []


def successes_nobody_heard_of(house: House, clients: Load) -> list[str]:
    """The next calls of sagas whose first step has just succeeded, with the answers of the database frozen. None: the
    machine stood still for so long that the worker has lost its lease meanwhile."""
    with clients.paused():
        until(lambda: not are_open(house.dsn), house.victim)
        house.to_shop.freeze("answers")
    clients.until_answered(6)
    with clients.paused():
        lost = house.victim.log.count("lease_lost")
        # All are at their first step. Nothing is being written when the answers of the database are held up, and then
        # those of the participant are not any more.
        until(lambda: all(house.calls_of(key) for key in next_calls(house, "STARTED", "RUNNING")), house.victim)
        house.to_database.freeze("answers")
        since = house.now()
        house.to_shop.thaw()
        until(
            lambda: bool(next_calls(house, "RUNNING", since=since)) or house.victim.log.count("lease_lost") > lost,
            house.victim,
        )
    return next_calls(house, "RUNNING", since=since)


def next_calls(house: House, *statuses: str, since: object = LONG_AGO) -> list[str]:
    """The idempotency keys of the steps that the victim's sagas are at, of those that have moved since then."""
    found = ask(
        house.dsn,
        "SELECT id, current_step FROM saga.saga_states"
        " WHERE status = ANY ($1::text[]) AND owner LIKE $2 AND updated_at > $3",
        list(statuses),
        house.victims_name,
        since,
    )
    return [f"{saga_id}:{step}:execute" for saga_id, step in found]


def before_201(house: House, clients: Load) -> None:
    """Starts are stored, and their clients have not been told."""
    with clients.paused():
        house.to_database.freeze("answers")
        since = house.now()
    stored = "SELECT 1 FROM saga.saga_states WHERE created_at > $1"
    until(lambda: bool(ask(house.dsn, stored, since)), house.victim)
    house.kill()


def on_the_call(house: House, method: str, at: str) -> None:
    """A call has arrived; the participant has done its work, or not yet, and has not answered."""
    once: Script = {method: [{**WORK, "kill": house.victim.process.pid, "at": at, "times": 1}, WORK], **SCRIPT}
    house.shop.script(once)
    assert house.victim.wait() == -signal.SIGKILL
    house.kill()
    house.shop.script(SCRIPT)


def before_the_work(house: House, _: Load) -> None:
    on_the_call(house, "Charge", "before")


def after_the_work(house: House, _: Load) -> None:
    on_the_call(house, "Charge", "after")


def after_the_work_of_an_undo(house: House, _: Load) -> None:
    on_the_call(house, "Release", "after")


def before_publish(house: House, _: Load) -> None:
    """Events are stored, and the broker has not been sent them."""
    until(lambda: relays(house), house.victim)
    house.to_broker.freeze("asks")
    since = house.now()
    # So many that the relay has read the first of them.
    until(lambda: len(house.unsent(since)) >= 30, house.victim)
    waiting = house.unsent(since)
    house.kill()
    assert waiting.isdisjoint(house.on_the_topic())


def before_acknowledgement(house: House, clients: Load) -> None:
    """Events are on the topic, and the relay has not been told that they are."""
    until(lambda: relays(house), house.victim)
    with clients.paused():
        until(lambda: not are_open(house.dsn) and not house.unsent(), house.victim)
        house.to_broker.freeze("answers")
        since = house.now()
    until(lambda: bool(house.unsent(since) & house.on_the_topic()), house.victim)
    house.kill()


def before_it_is_noted(house: House, _: Load) -> None:
    """Events are on the topic, the relay knows, and the outbox does not."""
    until(lambda: relays(house), house.victim)
    ask(house.dsn, STANDS_STILL.format(victim=house.victims_name))
    ask(
        house.dsn,
        "CREATE TRIGGER stand_still BEFORE UPDATE ON saga.outbox FOR EACH ROW EXECUTE FUNCTION stand_still()",
    )
    standing = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    until(lambda: bool(ask(house.dsn, f"SELECT 1 {standing}")), house.victim)
    house.kill()
    # The server's process would note them after all, some time.
    ask(house.dsn, f"SELECT pg_terminate_backend(pid, 10000) {standing}")
    ask(house.dsn, "DROP TRIGGER stand_still ON saga.outbox")
    ask(house.dsn, "DROP FUNCTION stand_still")


def relays(house: House) -> bool:
    """Whether the victim has its share of the outbox."""
    found = ask(house.dsn, "SELECT count(*) FROM saga.outbox_partitions WHERE relay LIKE $1", house.victims_name)
    return found == [(8,)]


# --- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "again"),
    [
        pytest.param(after_intent, False, id="after-intent"),
        pytest.param(before_the_work, False, id="after-the-call-was-sent"),
        pytest.param(after_the_work, False, id="after-the-work-was-done"),
        pytest.param(after_the_work_of_an_undo, False, id="after-an-undo-was-done"),
        pytest.param(after_commit, False, id="after-commit"),
        pytest.param(before_201, False, id="before-201-was-sent"),
        pytest.param(before_publish, False, id="before-publish"),
        pytest.param(before_acknowledgement, True, id="after-publish"),
        pytest.param(before_it_is_noted, True, id="before-publish-is-noted"),
    ],
)
def test_nothing_is_lost_and_nothing_done_twice_when_a_worker_is_killed(
    house: House, point: Callable[[House, Load], None], again: bool
) -> None:
    house.victim.until_ready()
    received = len(house.read.rest())
    with load([house.victim, house.other], list(ENDS), in_turn=False) as clients:
        clients.until_answered(20)
        point(house, clients)
        house.victim.spawn()
        clients.until_answered(10)
    audit(house, clients)
    new = [one.event_id for one in house.read.received[received:]]
    # What was sent, and not known to be, is sent once more.
    assert len(new) > len(set(new)) or not again


def audit(house: House, clients: Load) -> None:
    until(lambda: not are_open(house.dsn), house.other, house.victim)
    house.answered.update(clients.answered)
    clients.answered.update(house.answered)
    check_store(house.dsn, clients)
    check_books(house.shop.calls(), house.answered)
    house.read.until(stored_events(house.dsn))
    check_events(house.dsn, house.read.rest(), house.answered)
