"""What a client was told holds: a server that is killed with SIGKILL right after its answer keeps its word.

Real server processes on both stores, a real participant. Each test asks, is answered, kills, starts the server again
and looks at what became of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.load import until
from tests.support.participants import Participant, Script, participant
from tests.support.server_process import ServerProcess, server_process

TRIP = """\
name: trip
steps:
  - name: reserve
    service: shop
    method: Inventory.Reserve
    compensate: Inventory.Release
    compensate_retry: {max_attempts: 1}
  - name: charge
    service: shop
    method: Payments.Charge
    compensate: Payments.Refund
    retry: {max_attempts: 1}
"""
LONGER_TRIP = TRIP + "  - {name: ship, service: shop, method: Shipping.Ship}\n"

ONCE = {"once": True}
SLOW = {"delay_secs": 0.5, "once": True}


@contextmanager
def running(folder: Path, store_config: dict[str, str], script: Script) -> Iterator[tuple[ServerProcess, Participant]]:
    """A server with the workflow `trip` and its participant."""
    with participant(flavour="grpcio", script=script) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"lease_secs": 1.0}}
        with server_process(folder, config, env=store_config) as server:
            server.start()
            server.register(TRIP)
            yield server, shop


def wait_for(shop: Participant, method: str) -> None:
    until(lambda: bool(shop.calls(method)))


def told(detail: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(log["step_name"], log["action"], log["status"]) for log in detail["step_logs"]]


def test_a_saga_answered_201_is_run_though_the_server_is_killed_in_the_next_instant(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    with running(tmp_path, store_config, {"*": [SLOW]}) as (server, shop):
        saga_id = server.start_saga("trip", {"order_id": "o-1"})
        server.kill()
        server.start()
        detail = server.ended(saga_id)
        assert detail["saga"]["status"] == "COMPLETED"
        assert detail["saga"]["payload"] == {"order_id": "o-1"}
        assert shop.effects() == {f"{saga_id}:0:execute": 1, f"{saga_id}:1:execute": 1}


def test_an_idempotency_key_is_still_known_after_a_kill(tmp_path: Path, store_config: dict[str, str]) -> None:
    with running(tmp_path, store_config, {"*": [SLOW]}) as (server, shop):
        body = {"workflow_name": "trip", "payload": {"order_id": "o-1"}}
        first = server.call("POST", "/api/v1/sagas", body, Idempotency_Key="k-1")
        server.kill()
        server.start()
        assert server.call("POST", "/api/v1/sagas", body, Idempotency_Key="k-1") == first
        other = {**body, "payload": {"order_id": "o-2"}}
        status, answer = server.call("POST", "/api/v1/sagas", other, Idempotency_Key="k-1")
        assert (status, answer["error"]["code"]) == (409, "SYS_SAGA_CONFLICT")
        saga_id = first[1]["saga_id"]
        assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
        assert {call.metadata["saga-id"] for call in shop.calls()} == {saga_id}


def test_a_cancel_answered_200_holds_though_the_server_is_killed_in_the_next_instant(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    with running(tmp_path, store_config, {"Charge": [{"hang": True}], "*": [SLOW]}) as (server, shop):
        saga_id = server.start_saga("trip", {})
        wait_for(shop, "Charge")
        status, answer = server.call("POST", f"/api/v1/sagas/{saga_id}/cancel")
        server.kill()
        assert (status, answer) == (200, {"success": True, "message": f"saga {saga_id} cancelled"})
        # Nobody would refuse the charge now: a saga that forgot its cancel would complete.
        shop.script({"*": [ONCE]})
        server.start()
        detail = server.ended(saga_id)
        assert detail["saga"]["status"] == "CANCELLED"
        assert told(detail) == [
            ("reserve", "EXECUTE", "SUCCESS"),
            ("charge", "EXECUTE", "FAILED"),
            ("reserve", "COMPENSATE", "SUCCESS"),
        ]
        assert shop.effects() == {f"{saga_id}:0:execute": 1, f"{saga_id}:0:compensate": 1}
        assert len(shop.calls("Charge")) == 1


def test_a_cancel_that_only_names_the_end_holds_over_a_kill_during_the_undo(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    script: Script = {"Charge": [{"status": "FAILED_PRECONDITION"}], "Release": [{"hang": True}], "*": [ONCE]}
    with running(tmp_path, store_config, script) as (server, shop):
        saga_id = server.start_saga("trip", {})
        wait_for(shop, "Release")
        assert server.call("POST", f"/api/v1/sagas/{saga_id}/compensate")[0] == 200
        server.kill()
        shop.script({"*": [ONCE]})
        server.start()
        detail = server.ended(saga_id)
        assert detail["saga"]["status"] == "CANCELLED"
        assert detail["saga"]["error_message"].startswith("step charge failed: FAILED_PRECONDITION")
        # The undo was not stopped by the cancel, and not given up by the kill: asked for again under its key.
        undone = shop.calls("Release")
        assert [call.metadata["idempotency-key"] for call in undone] == [f"{saga_id}:0:compensate"] * 2
        first, second = (int(call.metadata["saga-epoch"]) for call in undone)
        assert second > first


def test_a_retry_of_compensations_answered_202_holds_though_the_server_is_killed_in_the_next_instant(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    refuses = {"status": "FAILED_PRECONDITION"}
    script: Script = {"Charge": [refuses], "Release": [refuses], "*": [ONCE]}
    with running(tmp_path, store_config, script) as (server, shop):
        saga_id = server.start_saga("trip", {})
        failed = server.ended(saga_id)["saga"]
        assert (failed["status"], failed["compensation_failed"]) == ("FAILED", True)
        listed = server.call("GET", "/api/v1/sagas?compensation_failed=true")[1]["sagas"]
        assert [saga["saga_id"] for saga in listed] == [saga_id]
        shop.script({"*": [SLOW]})
        status, answer = server.call("POST", f"/api/v1/sagas/{saga_id}/retry-compensation")
        server.kill()
        assert (status, answer) == (202, {"saga_id": saga_id, "status": "COMPENSATING"})
        server.start()
        mended = server.ended(saga_id)["saga"]
        assert (mended["status"], mended["compensation_failed"]) == ("FAILED", False)
        assert shop.effects()[f"{saga_id}:0:compensate"] == 1
        assert server.call("POST", f"/api/v1/sagas/{saga_id}/retry-compensation")[0] == 409


def test_a_saga_ends_on_the_version_it_started_with_though_another_was_registered_and_the_server_killed(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    with running(tmp_path, store_config, {"Charge": [{"hang": True}], "*": [ONCE]}) as (server, shop):
        old = server.start_saga("trip", {})
        wait_for(shop, "Charge")
        answer = server.call("POST", "/api/v1/workflows", {"workflow_yaml": LONGER_TRIP})
        assert answer == (201, {"name": "trip", "version": 2, "step_count": 3})
        server.kill()
        shop.script({"*": [ONCE]})
        server.start()
        new = server.start_saga("trip", {})
        ended = {saga_id: server.ended(saga_id)["saga"] for saga_id in (old, new)}
        assert {saga["status"] for saga in ended.values()} == {"COMPLETED"}
        assert (ended[old]["workflow_version"], ended[old]["current_step"]) == (1, 2)
        assert (ended[new]["workflow_version"], ended[new]["current_step"]) == (2, 3)
        assert [call.metadata["saga-id"] for call in shop.calls("Ship")] == [new]
