"""What one worker does reaches the other by notice alone: two real servers that hardly ever look by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.load import until
from tests.support.participants import Participant, Script, participant
from tests.support.postgres import ask
from tests.support.server_process import ServerProcess, server_process

ONE = "name: one\nsteps:\n  - {name: reserve, service: shop, method: Inventory.Reserve}\n"
TWO = ONE + "  - {name: charge, service: shop, method: Payments.Charge}\n"

RARELY = (
    "-c",
    "import sys; from saga import catalog, supervisor; supervisor.POLL_SECS = catalog.LATEST_FOR_SECS = 3600.0;"
    " from server.cli import main; sys.exit(main(sys.argv[1:]))",
)


@contextmanager
def two_servers(
    folder: Path, dsn: str, script: Script, **saga: Any
) -> Iterator[tuple[ServerProcess, ServerProcess, Participant]]:
    with participant(flavour="grpclib", script=script) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"shutdown_grace_secs": 1.0, **saga}}
        (folder / "first").mkdir()
        (folder / "second").mkdir()
        env = {"DATABASE_URL": dsn}
        with (
            server_process(folder / "first", config, env=env, program=RARELY) as first,
            server_process(folder / "second", config, env=env, program=RARELY) as second,
        ):
            first.start()
            second.start()
            listening = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ~ '^LISTEN'"
            until(lambda: ask(dsn, listening) == [(2,)], first, second)
            first.register(ONE)
            yield first, second, shop


def test_a_cancel_reaches_the_call_in_flight_at_another_worker(tmp_path: Path, postgres_dsn: str) -> None:
    with two_servers(tmp_path, postgres_dsn, {"*": [{"hang": True}]}) as (first, second, shop):
        saga_id = first.start_saga("one", {})
        until(lambda: bool(shop.calls()), first)
        assert second.call("POST", f"/api/v1/sagas/{saga_id}/cancel")[0] == 200
        assert second.ended(saga_id)["saga"]["status"] == "CANCELLED"


def test_a_saga_that_one_worker_has_no_room_for_is_run_by_the_other(tmp_path: Path, postgres_dsn: str) -> None:
    script: Script = {"*": [{"hang": True, "times": 1}, {"once": True}]}
    with two_servers(tmp_path, postgres_dsn, script, max_concurrent=1) as (first, second, shop):
        first.start_saga("one", {})
        until(lambda: bool(shop.calls()), first)
        assert first.ended(first.start_saga("one", {}))["saga"]["status"] == "COMPLETED"
        assert len(ask(postgres_dsn, "SELECT DISTINCT owner FROM saga.saga_states")) == 2
        assert second.call("GET", "/readyz")[0] == 200


def test_a_workflow_that_is_registered_at_one_worker_is_started_at_the_other(tmp_path: Path, postgres_dsn: str) -> None:
    with two_servers(tmp_path, postgres_dsn, {}) as (first, second, _):
        assert first.ended(first.start_saga("one", {}))["saga"]["workflow_version"] == 1
        second.register(TWO)
        # The notice is sent before the registration is answered; how soon the other has read it, nobody can say.
        until(lambda: first.ended(first.start_saga("one", {}))["saga"]["workflow_version"] == 2, first)


def test_what_a_worker_leaves_when_it_stops_is_taken_by_the_other(tmp_path: Path, postgres_dsn: str) -> None:
    script: Script = {"*": [{"hang": True, "times": 1}, {"once": True}]}
    with two_servers(tmp_path, postgres_dsn, script, lease_secs=600.0) as (first, second, shop):
        saga_id = first.start_saga("one", {})
        until(lambda: bool(shop.calls()), first)
        first.process.terminate()
        assert first.wait() == 0
        assert second.ended(saga_id)["saga"]["status"] == "COMPLETED"
