"""Workers under load, and one trouble after the other, drawn from a seed: `make chaos MINUTES=10`.

`saga serve --workers N` on a Postgres of its own, clients that start sagas without pause, participants that lose every
fifth reply after the work was done. Workers are killed, stand still past their lease, lose their connections; Postgres
is restarted and crashes; the broker goes away, or only hangs. At the end: every start that was answered 201 has its
saga and there are no others, all have ended as they should, the participants' books balance, and every event is on the
topic.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from tests.support.line import Line, line_to
from tests.support.participants import Script, participant
from tests.support.postgres import PostgresServer, ask, running_server
from tests.support.server_process import ServerProcess, server_process

LEASE_SECS = 1.5

LOST = {"status": "UNAVAILABLE", "effect": True, "every": 5, "once": True, "delay_secs": 0.05}
SCRIPT: Script = {
    "Insure": [{"status": "UNAVAILABLE", "every": 5}, REFUSES],
    "*": [LOST, {"once": True, "delay_secs": 0.05}],
}

TROUBLES = ("kill", "kill", "freeze", "cut", "restart", "crash", "lose_broker", "lose_broker", "hang_broker")
"""What may happen; what is named twice happens twice as often."""


class House:
    """The servers of one run, and what can be done to them."""

    def __init__(
        self, server: ServerProcess, postgres: PostgresServer, dsn: str, to_broker: Line, draw: random.Random
    ) -> None:
        self.server = server
        self._to_broker = to_broker
        self._postgres = postgres
        self._dsn = dsn
        self._draw = draw

    def _victim(self) -> int:
        """The process of a worker, any of them."""
        pids = dict(re.findall(r"worker_started worker=(\d+) pid=(\d+)", self.server.log))
        return int(pids[self._draw.choice(sorted(pids))])

    def kill(self) -> None:
        try:
            os.kill(self._victim(), signal.SIGKILL)
        except ProcessLookupError:
            pass  # dead already, and not yet started again

    def freeze(self) -> None:
        """Until the others have taken its sagas and struck it off."""
        pid = self._victim()
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return
        try:
            until(lambda: not ask(self._dsn, f"SELECT 1 FROM saga.workers WHERE id LIKE '%-{pid}-%'"), self.server)
        finally:
            os.kill(pid, signal.SIGCONT)

    def cut(self) -> None:
        ask(
            self._dsn,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )

    def restart(self) -> None:
        self._postgres.stop()
        self._postgres.start()

    def crash(self) -> None:
        self._postgres.crash()
        self._postgres.start()

    def lose_broker(self) -> None:
        """It is away, and then back; or it stays away until the next time."""
        if self._to_broker.is_cut:
            self._to_broker.mend()
        else:
            self._to_broker.cut()

    def hang_broker(self) -> None:
        """It takes what it is sent and does not answer, until the connections are cut."""
        self._to_broker.freeze("answers")
        waiting = stored_events(self._dsn)
        until(lambda: stored_events(self._dsn) >= waiting + 10, self.server)
        self._to_broker.cut()
        self._to_broker.thaw()
        self._to_broker.mend()

    def mend(self) -> None:
        """All that was lost is back."""
        self._to_broker.mend()


def run(
    folder: Path,
    postgres: PostgresServer,
    dsn: str,
    *,
    workers: int,
    seed: int,
    troubles: Sequence[str] = TROUBLES,
    is_over: Callable[[int], bool],
) -> Counter[str]:
    """Makes trouble until `is_over`, asked with the number of troubles so far; what was done, by kind. AssertionError:
    a promise was broken."""
    draw = random.Random(seed)
    done = Counter[str]()
    with ExitStack() as stack:
        broker = MockBroker()
        stack.callback(broker.close)
        topic = broker.topic()
        to_broker = stack.enter_context(line_to(int(broker.bootstrap.rpartition(":")[2]), stands_in=True))
        shop = stack.enter_context(participant(flavour="grpcio", script=SCRIPT))
        config = {
            "services": {"shop": shop.settings()},
            "saga": {"lease_secs": LEASE_SECS, "shutdown_grace_secs": 5.0},
            "kafka": {"brokers": [f"127.0.0.1:{to_broker.port}"], "topics": {"publish": topic}},
        }
        with server_process(folder, config, "--workers", str(workers), env={"DATABASE_URL": dsn}) as server:
            server.start()
            for workflow in (GOOD, DOOMED):
                server.register(workflow)
            house = House(server, postgres, dsn, to_broker, draw)
            read = stack.enter_context(reader(broker, topic))
            with load([server], list(ENDS)) as clients:
                while not is_over(done.total()):
                    read.rest()  # the broker keeps a few mebibytes, no more
                    clients.until_answered(draw.randrange(5, 40))
                    trouble = draw.choice(troubles)
                    getattr(house, trouble)()
                    done[trouble] += 1
                clients.until_answered(20)
            house.mend()
            until(lambda: not are_open(dsn), server)
            check_store(dsn, clients)
            read.until(stored_events(dsn))
            check_events(dsn, read.rest(), clients.answered)
            done["events"], done["events sent again"] = stored_events(dsn), len(read.received) - stored_events(dsn)
            server.signal(signal.SIGTERM)
            assert server.wait(60) == 0
            assert "Traceback" not in server.log, server.log
        check_books(shop.calls(), clients.answered)
    done["sagas"] = len(clients.answered)
    done["requests refused"] = clients.refused.total()
    done["requests dropped"] = clients.dropped
    return done


def main() -> None:
    parser = argparse.ArgumentParser(prog="chaos", description="Makes trouble and checks that nothing is lost.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"chaos: {options.minutes:g} minutes, {options.workers} workers, seed {seed}", flush=True)
    ends_at = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as folder, running_server() as postgres:
        postgres.make_template()
        with postgres.cloned_database() as dsn:
            try:
                done = run(
                    Path(folder),
                    postgres,
                    dsn,
                    workers=options.workers,
                    seed=seed,
                    is_over=lambda _: time.monotonic() >= ends_at,
                )
            except AssertionError:
                print(f"chaos: a promise was broken, seed {seed}", file=sys.stderr)
                raise
            finally:
                if not postgres.is_running:
                    postgres.start()
    told = ", ".join(f"{count} {kind}" for kind, count in done.items())
    print(f"chaos: all sagas ended as they should and the books balance, no event is missing; {told}")


if __name__ == "__main__":
    main()
