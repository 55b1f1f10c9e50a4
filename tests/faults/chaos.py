"""Workers under load, and one trouble after the other, drawn from a seed: `make chaos MINUTES=10`.

`saga serve --workers N` on a Postgres of its own, clients that start sagas without pause, participants that lose every
fifth reply after the work was done. Workers are killed, stand still past their lease, lose their connections; Postgres
is restarted and crashes. At the end: every start that was answered 201 has its saga and there are no others, all have
ended as they should, and the participants' books balance.
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
from pathlib import Path

from tests.faults.load import Load, load, until
from tests.faults.test_kill import by_saga
from tests.store.test_postgres import ask
from tests.support.participants import Call, Script, participant
from tests.support.postgres import PostgresServer, running_server
from tests.support.server_process import ServerProcess, server_process

LEASE_SECS = 1.5

STEPS = """\
name: {name}
steps:
  - {{name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release, {rest}}}
  - {{name: charge, service: shop, method: Payments.Charge, compensate: Payments.Refund, {rest}}}
  - {{name: last, service: shop, method: {last}, compensate: Shipping.Recall, {rest}}}
"""
PATIENT = "retry: {max_attempts: 50, initial_interval_ms: 20, max_interval_ms: 200}"
REST = f"on_unknown: compensate, {PATIENT}, compensate_{PATIENT}"
GOOD = STEPS.format(name="good", last="Shipping.Ship", rest=REST)
DOOMED = STEPS.format(name="doomed", last="Inventory.Count", rest=REST)
ENDS = {"good": "COMPLETED", "doomed": "FAILED"}

LOST = {"status": "UNAVAILABLE", "effect": True, "every": 5, "once": True, "delay_secs": 0.05}
SCRIPT: Script = {
    "Count": [{"status": "UNAVAILABLE", "every": 5}, {"status": "FAILED_PRECONDITION", "message": "no"}],
    "*": [LOST, {"once": True, "delay_secs": 0.05}],
}

TROUBLES = ("kill", "kill", "freeze", "cut", "restart", "crash")
"""What may happen; what is named twice happens twice as often."""


class House:
    """The servers of one run, and what can be done to them."""

    def __init__(self, server: ServerProcess, postgres: PostgresServer, dsn: str, draw: random.Random) -> None:
        self.server = server
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
    with participant(flavour="grpcio", script=SCRIPT) as shop:
        config = {
            "services": {"shop": shop.settings()},
            "saga": {"lease_secs": LEASE_SECS, "shutdown_grace_secs": 5.0},
        }
        with server_process(folder, config, "--workers", str(workers), env={"DATABASE_URL": dsn}) as server:
            server.start()
            for workflow in (GOOD, DOOMED):
                server.register(workflow)
            house = House(server, postgres, dsn, draw)
            with load([server], list(ENDS)) as clients:
                while not is_over(done.total()):
                    clients.until_answered(draw.randrange(5, 40))
                    trouble = draw.choice(troubles)
                    getattr(house, trouble)()
                    done[trouble] += 1
                clients.until_answered(20)
            until(lambda: not open_sagas(dsn), server)
            check_store(dsn, clients)
            server.signal(signal.SIGTERM)
            assert server.wait(60) == 0
            assert "Traceback" not in server.log, server.log
        check_books(shop.calls(), clients)
    done["sagas"] = len(clients.answered)
    done["requests refused"] = clients.refused.total()
    done["requests dropped"] = clients.dropped
    return done


def open_sagas(dsn: str) -> list[tuple[object, ...]]:
    return ask(dsn, "SELECT 1 FROM saga.saga_states WHERE status IN ('STARTED', 'RUNNING', 'COMPENSATING') LIMIT 1")


def check_store(dsn: str, clients: Load) -> None:
    """Every saga that was answered 201 is there, and no other, and each has ended as its workflow does."""
    assert not clients.unexpected
    assert set(clients.refused) <= {"SYS_SAGA_UNAVAILABLE"}
    stored = {
        str(row[0]): tuple(row[1:])
        for row in ask(dsn, "SELECT id, workflow_name, status, compensation_failed FROM saga.saga_states")
    }
    assert stored == {saga_id: (name, ENDS[name], False) for saga_id, name in clients.answered.items()}


def check_books(calls: list[Call], clients: Load) -> None:
    """No effect twice; of a completed saga all are there and none is undone, of a failed one all are undone, in
    reverse. (Undone may also be the last step, which never happened: its outcome was unknown.)"""
    made = by_saga(calls)
    assert made.keys() == clients.answered.keys()
    for saga_id, workflow in clients.answered.items():
        keys = [call.metadata["idempotency-key"] for call in made[saga_id] if call.effect]
        assert len(keys) == len(set(keys)), keys
        steps = [key.removeprefix(f"{saga_id}:").split(":") for key in keys]
        executed = {int(index) for index, action in steps if action == "execute"}
        undone = [int(index) for index, action in steps if action == "compensate"]
        if workflow == "good":
            assert (executed, undone) == ({0, 1, 2}, []), steps
        else:
            assert executed == {0, 1}, steps
            assert undone in ([1, 0], [2, 1, 0]), steps


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
    print(f"chaos: all sagas ended as they should and the books balance; {told}")


if __name__ == "__main__":
    main()
