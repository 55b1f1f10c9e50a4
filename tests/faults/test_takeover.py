"""A worker that dies, stands still or is cut off: another one goes on, and what the first says late changes nothing.

Two real servers on one Postgres, a participant that answers slowly and honours idempotency keys.
"""

from __future__ import annotations

import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tests.faults.load import until
from tests.faults.test_kill import GOOD, by_saga, check_ledger
from tests.support.participants import Participant, participant
from tests.support.postgres import PostgresServer, ask
from tests.support.relay import relay
from tests.support.server_process import ServerProcess, server_process

SAGAS = 5
LEASE_SECS = 1.5
LATE_SECS = 5.0
"""How much later than the contract's two seconds a take-over may be on a machine that has other things to do."""


@contextmanager
def two_servers(
    folder: Path, dsn: str, first_dsn: str, shop: Participant
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Both ready; the first reaches the database by an address of its own."""
    config = {"services": {"shop": shop.settings()}, "saga": {"lease_secs": LEASE_SECS, "shutdown_grace_secs": 1.0}}
    (folder / "first").mkdir()
    (folder / "second").mkdir()
    with (
        server_process(folder / "first", config, env={"DATABASE_URL": first_dsn}) as first,
        server_process(folder / "second", config, env={"DATABASE_URL": dsn}) as second,
    ):
        first.start()
        second.start()
        first.register(GOOD)
        yield first, second


def started_on(server: ServerProcess, shop: Participant) -> list[str]:
    """Sagas that this server runs, each with its first call on the way."""
    sagas = [server.start_saga("good", {"order_id": f"o-{number}", "amount": 1}) for number in range(SAGAS)]
    until(lambda: len(shop.calls("Reserve")) == SAGAS, server)
    return sagas


def leases(dsn: str, owner: str) -> list[datetime]:
    return [row[0] for row in ask(dsn, "SELECT lease_until FROM saga.workers WHERE id = $1", owner)]


def leases_lost(server: ServerProcess) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        text: str = answer.read().decode()
    return float(next(line for line in text.splitlines() if line.startswith("saga_leases_lost_total ")).split()[1])


def check_taken_over(shop: Participant, second: ServerProcess, sagas: list[str]) -> None:
    """All completed by the second server, every effect there once, and participants can tell old from new."""
    for saga_id in sagas:
        assert second.ended(saga_id)["saga"]["status"] == "COMPLETED"
    check_ledger(shop.calls(), dict.fromkeys(sagas, "COMPLETED"))
    for calls in by_saga(shop.calls()).values():
        epochs = [int(call.metadata["saga-epoch"]) for call in calls]
        assert epochs == sorted(epochs)
        assert set(epochs) == {1, 2}


def test_a_worker_that_was_killed_is_succeeded_when_its_lease_has_ended(
    tmp_path: Path, postgres_dsn: str, record_property: Callable[[str, object], None]
) -> None:
    with (
        participant(flavour="grpcio", script={"Reserve": [{"hang": True}], "*": [{"once": True}]}) as shop,
        two_servers(tmp_path, postgres_dsn, postgres_dsn, shop) as (first, second),
    ):
        sagas = started_on(first, shop)
        (owner,) = {row[0] for row in ask(postgres_dsn, "SELECT owner FROM saga.saga_states")}
        lease = leases(postgres_dsn, owner)
        first.kill()
        lease = leases(postgres_dsn, owner) or lease  # it may have been renewed in between
        until(lambda: len(shop.calls("Reserve")) == 2 * SAGAS, second)
        # A claim is the last thing that happened to these rows: their calls hang.
        claimed = ask(postgres_dsn, "SELECT min(updated_at), max(updated_at) FROM saga.saga_states")
        early, late = ((instant - lease[0]).total_seconds() for instant in claimed[0])
        record_property("takeover_secs_after_the_lease", late)
        print(f"taken over {late:.2f} s after the lease had ended")
        assert early >= 0
        assert late <= 2.0 + LATE_SECS
        assert f"sagas_freed count={SAGAS} " in second.log
        for saga_id in sagas:
            assert f"saga_resumed saga_id={saga_id} status=RUNNING epoch=2" in second.log
        shop.script({"*": [{"once": True}]})
        second.signal(signal.SIGTERM)  # resets the calls that hang, and leaves the sagas to whoever comes
        first.start()
        for saga_id in sagas:
            assert first.ended(saga_id)["saga"]["status"] == "COMPLETED"


def test_a_worker_that_stood_still_past_its_lease_changes_nothing_when_it_wakes_and_works_again(
    tmp_path: Path, postgres_dsn: str
) -> None:
    with (
        participant(flavour="grpcio", script={"*": [{"delay_secs": 0.5, "once": True}]}) as shop,
        two_servers(tmp_path, postgres_dsn, postgres_dsn, shop) as (first, second),
    ):
        sagas = started_on(first, shop)
        first.signal(signal.SIGSTOP)
        check_taken_over(shop, second, sagas)
        before = [second.call("GET", f"/api/v1/sagas/{saga_id}") for saga_id in sagas]
        first.signal(signal.SIGCONT)
        until(lambda: "lease_lost worker_id=" in first.log, first)
        mine = first.start_saga("good", {"order_id": "o-after", "amount": 1})
        assert first.ended(mine)["saga"]["status"] == "COMPLETED"
        assert [second.call("GET", f"/api/v1/sagas/{saga_id}") for saga_id in sagas] == before
        check_ledger(shop.calls(), dict.fromkeys([*sagas, mine], "COMPLETED"))


def test_writes_that_reach_the_database_after_the_lease_are_refused_and_counted(
    tmp_path: Path, postgres_dsn: str, postgres_server: PostgresServer
) -> None:
    with relay(postgres_server.port) as late:
        first_dsn = postgres_dsn.replace(f":{postgres_server.port}/", f":{late.port}/")
        with (
            participant(flavour="grpcio", script={"*": [{"delay_secs": 0.5, "once": True}]}) as shop,
            two_servers(tmp_path, postgres_dsn, first_dsn, shop) as (first, second),
        ):
            sagas = started_on(first, shop)
            # What the first server has to say of the answers it is about to get comes after all is over.
            late.hold()
            check_taken_over(shop, second, sagas)
            before = [second.call("GET", f"/api/v1/sagas/{saga_id}") for saga_id in sagas]
            late.let_go()
            until(lambda: leases_lost(first) >= 1, first)
            assert [second.call("GET", f"/api/v1/sagas/{saga_id}") for saga_id in sagas] == before
            assert leases_lost(second) == 0
            assert f"lease_lost saga_id={sagas[0]}" in first.log
            mine = first.start_saga("good", {"order_id": "o-after", "amount": 1})
            assert first.ended(mine)["saga"]["status"] == "COMPLETED"
            check_ledger(shop.calls(), dict.fromkeys([*sagas, mine], "COMPLETED"))
