"""The broker goes away under load and comes back: sagas go on, events wait in the table and not in memory."""

from __future__ import annotations

import signal
from pathlib import Path

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
from tests.faults.load import load, until
from tests.support.kafka import MockBroker, reader
from tests.support.participants import Script, participant
from tests.support.postgres import ask
from tests.support.server_process import ServerProcess, server_process

PADDING = "x" * 100_000
WARM = 100
WAITING = 300
"""Events. With the payload in each they are 30 MB, of which the server may grow by two thirds; it grows by one MB, and
by a dozen where the machine is so busy that everything in flight piles up."""

SCRIPT: Script = {"Insure": [REFUSES], "*": [{"once": True}]}


def memory_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def test_while_the_broker_is_away_sagas_end_memory_stays_flat_and_every_event_comes_later_in_order(
    tmp_path: Path, postgres_dsn: str
) -> None:
    broker = MockBroker()
    topic = broker.topic(partitions=100)  # the mock cluster keeps 5 MiB in each
    with participant(flavour="grpcio", script=SCRIPT) as shop:
        config = {
            "services": {"shop": shop.settings()},
            "kafka": {"brokers": [broker.bootstrap], "topics": {"publish": topic}},
        }
        with (
            reader(broker, topic) as read,
            server_process(tmp_path, config, env={"DATABASE_URL": postgres_dsn}) as server,
        ):
            server.start()
            for workflow in (GOOD, DOOMED):
                server.register(workflow)
            unsent = "SELECT count(*) FROM saga.outbox WHERE published_at IS NULL"
            with load([server], list(ENDS), payload={"note": PADDING}) as clients:
                clients.until_answered(20)
                until(lambda: bool(read.rest()), server)
                broker.down()
                # By then the server has what it needs for itself.
                until(lambda: ask(postgres_dsn, unsent)[0][0] >= WARM, server)
                before = memory_bytes(server)
                until(lambda: ask(postgres_dsn, unsent)[0][0] >= WARM + WAITING, server)
                grown = memory_bytes(server) - before
                assert grown < WAITING * len(PADDING) * 2 / 3, grown
                # Nobody waits for the broker.
                clients.until_answered(5)
                broker.up()
                clients.until_answered(20)
            until(lambda: not are_open(postgres_dsn), server)
            check_store(postgres_dsn, clients)
            check_books(shop.calls(), clients.answered)
            read.until(stored_events(postgres_dsn))
            check_events(postgres_dsn, read.rest(), clients.answered)
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
    broker.close()
