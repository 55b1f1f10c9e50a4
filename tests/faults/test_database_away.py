"""The database goes away, or only hangs, under a running server; a real Postgres behind a line that can be cut."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.load import until
from tests.support.line import Line, line_to
from tests.support.participants import Participant, Script, participant
from tests.support.postgres import PostgresServer
from tests.support.server_process import ServerProcess, server_process

LEASE_SECS = 1.5

TRIP = """\
name: trip
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
  - {name: charge, service: shop, method: Payments.Charge, compensate: Payments.Refund}
"""


@contextmanager
def running(
    folder: Path, postgres: PostgresServer, dsn: str, script: Script
) -> Iterator[tuple[ServerProcess, Participant, Line]]:
    with participant(flavour="grpcio", script=script) as shop, line_to(postgres.port) as line:
        config = {"services": {"shop": shop.settings()}, "saga": {"lease_secs": LEASE_SECS, "shutdown_grace_secs": 1}}
        env = {"DATABASE_URL": dsn.replace(str(postgres.port), str(line.port))}
        with server_process(folder, config, env=env) as server:
            server.start()
            server.register(TRIP)
            yield server, shop, line


def test_a_database_that_goes_away_stalls_sagas_and_loses_nothing(
    tmp_path: Path, postgres_server: PostgresServer, postgres_dsn: str
) -> None:
    script: Script = {"Reserve": [{"delay_secs": 0.3, "once": True}], "*": [{"once": True}]}
    with running(tmp_path, postgres_server, postgres_dsn, script) as (server, shop, line):
        saga_id, *others = [server.start_saga("trip", {}) for _ in range(10)]
        until(lambda: len(shop.calls("Reserve")) == 10, server)
        before = len(server.log)
        line.cut()
        for method, path in (
            ("GET", f"/api/v1/sagas/{saga_id}"),
            ("GET", "/api/v1/sagas"),
            ("GET", "/api/v1/workflows"),
            ("POST", f"/api/v1/sagas/{saga_id}/cancel"),
            ("POST", f"/api/v1/sagas/{saga_id}/retry-compensation"),
        ):
            status, answer = server.call(method, path)
            assert (status, answer["error"]["code"]) == (503, "SYS_SAGA_UNAVAILABLE"), path
        status, readiness = server.call("GET", "/readyz")
        assert (status, readiness["status"]) == (503, "unhealthy")
        assert server.call("GET", "/healthz")[0] == 200
        until(lambda: "store_unavailable" in server.log, server)
        # The second step is not called on the strength of a success that is not stored.
        assert not shop.calls("Charge")
        line.mend()
        for one in (saga_id, *others):
            assert server.ended(one)["saga"]["status"] == "COMPLETED"
        assert shop.effects() == {f"{one}:{step}:execute": 1 for one in (saga_id, *others) for step in (0, 1)}
        assert "Traceback" not in server.log
        # Told to people once, whatever number of sagas waits, and once when it is over.
        until(lambda: "store_back" in server.log, server)
        assert re.search(r"store_back secs=[0-9.]+ failed=\w+:[1-9]", server.log)
        loud = re.findall(r" (?:WARNING|ERROR) +\S+ (\w+)", server.log[before:])
        assert loud.count("store_unavailable") == 1
        assert set(loud) <= {"store_unavailable", "check_failed", "readiness_changed", "lease_lost"}


def test_a_worker_whose_database_hangs_stops_its_calls_before_its_lease_ends(
    tmp_path: Path, postgres_server: PostgresServer, postgres_dsn: str
) -> None:
    script: Script = {"Reserve": [{"hang": True, "times": 1}, {"once": True}], "*": [{"once": True}]}
    with running(tmp_path, postgres_server, postgres_dsn, script) as (server, shop, line):
        saga_id = server.start_saga("trip", {})
        until(lambda: bool(shop.calls("Reserve")), server)
        line.freeze()
        frozen_at = time.monotonic()
        while shop.calls("Reserve")[0].ended != "cancelled":
            assert server.process.poll() is None
        # Then others may claim the saga; the step itself would have been given 30 s.
        assert time.monotonic() - frozen_at < LEASE_SECS
        assert "lease_lost" in server.log
        line.cut()
        line.thaw()
        line.mend()
        assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
        assert {call.metadata["idempotency-key"] for call in shop.calls("Reserve")} == {f"{saga_id}:0:execute"}


def test_a_server_whose_database_hangs_can_be_stopped(
    tmp_path: Path, postgres_server: PostgresServer, postgres_dsn: str
) -> None:
    with running(tmp_path, postgres_server, postgres_dsn, {"*": [{"hang": True}]}) as (server, shop, line):
        server.start_saga("trip", {})
        until(lambda: bool(shop.calls("Reserve")), server)
        line.freeze()
        server.signal(signal.SIGTERM)
        assert server.wait(25.0) == 0
        assert "Traceback" not in server.log
