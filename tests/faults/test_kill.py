"""SIGKILL in the middle of 200 running sagas, and a restart: every saga ends, every effect is there once.

Real server processes on both stores, a real participant (grpcio) that honours idempotency keys and writes down each
call. Nothing is mocked and nothing is told to the server before it is killed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.load import until
from tests.support.participants import Call, participant
from tests.support.server_process import ServerProcess, server_process

SAGAS = 200
LEASE_SECS = 1.0

STEPS = """\
name: {name}
steps:
  - name: reserve
    service: shop
    method: Inventory.Reserve
    compensate: Inventory.Release
    retry: {{initial_interval_ms: 50}}
  - name: charge
    service: shop
    method: Payments.Charge
    compensate: Payments.Refund
    retry: {{initial_interval_ms: 50}}
  - name: {last}
    service: shop
    method: {last_method}
    compensate: Shipping.Recall
    retry: {{initial_interval_ms: 50}}
"""
GOOD = STEPS.format(name="good", last="ship", last_method="Shipping.Ship")
DOOMED = STEPS.format(name="doomed", last="insure", last_method="Shipping.Insure")
"""Its last step is refused, so that compensations are cut off too."""

SCRIPT: dict[str, list[dict[str, Any]]] = {
    "Insure": [{"delay_secs": 0.3, "status": "FAILED_PRECONDITION", "message": "no"}],
    "*": [{"delay_secs": 0.3, "once": True}],
}


def test_after_sigkill_amid_200_sagas_each_ends_and_each_effect_happened_once(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    with participant(flavour="grpcio", script=SCRIPT) as shop:
        config = {
            "services": {"shop": shop.settings()},
            "saga": {"max_concurrent": SAGAS, "lease_secs": LEASE_SECS},
        }
        with server_process(tmp_path, config, env=store_config) as server:
            server.start()
            server.register(GOOD)
            server.register(DOOMED)
            expected = start_all(server)
            # All are under way, and the first are further: steps done, undos begun.
            until(lambda: amid(by_saga(shop.calls())), server)
            server.kill()
            before = by_saga(shop.calls())
            server.start()
            for saga_id, status in expected.items():
                assert server.ended(saga_id)["saga"]["status"] == status
            check_ledger(shop.calls(), expected)
            check_logs(server, expected)
        # The kill really was in the middle, and the new owner says so to participants.
        assert len(before) == len(expected) == SAGAS
        assert any(len(calls) > 1 for calls in before.values())
        # (Where the participant has noticed by now, the call it had in hand is "cancelled".)
        assert any(call.ended != "answered" for calls in before.values() for call in calls)
        epochs = {int(call.metadata["saga-epoch"]) for call in shop.calls()}
        assert len(epochs) > 1


def start_all(server: ServerProcess) -> dict[str, str]:
    """Starts the sagas, half of each kind; the status each must end with."""

    def start(number: int) -> tuple[str, str]:
        name, status = ("good", "COMPLETED") if number % 2 else ("doomed", "FAILED")
        return server.start_saga(name, {"order_id": f"o-{number}", "amount": number}), status

    with ThreadPoolExecutor(16) as threads:
        return dict(threads.map(start, range(SAGAS)))


def amid(calls: dict[str, list[Call]]) -> bool:
    """Every saga has begun and some have come to their second step."""
    return len(calls) == SAGAS and any(len(made) > 1 for made in calls.values())


def by_saga(calls: list[Call]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        found[call.metadata["saga-id"]].append(call)
    return found


def check_ledger(calls: list[Call], expected: dict[str, str]) -> None:
    """Each key has one effect, no more; undone is what was done, in reverse, and nothing else."""
    for saga_id, made in by_saga(calls).items():
        effects = [call for call in made if call.effect]
        keys = [call.metadata["idempotency-key"] for call in effects]
        if expected[saga_id] == "COMPLETED":
            actions = ["0:execute", "1:execute", "2:execute"]
        else:
            actions = ["0:execute", "1:execute", "1:compensate", "0:compensate"]
        assert keys == [f"{saga_id}:{action}" for action in actions]
        for call in made:
            action = call.metadata["saga-action"]
            index = {"reserve": 0, "charge": 1, "ship": 2, "insure": 2}[call.metadata["saga-step"]]
            assert call.metadata["idempotency-key"] == f"{saga_id}:{index}:{action}"
            # An attempt that the crash cut off is made again under its number, not counted.
            assert call.metadata["saga-attempt"] == "1"


def check_logs(server: ServerProcess, expected: dict[str, str]) -> None:
    """What is recorded is what was done: one log an action, in order."""
    for saga_id, status in expected.items():
        logs: list[dict[str, Any]] = server.call("GET", f"/api/v1/sagas/{saga_id}")[1]["step_logs"]
        told = [(log["step_index"], log["action"], log["status"]) for log in logs]
        if status == "COMPLETED":
            assert told == [(0, "EXECUTE", "SUCCESS"), (1, "EXECUTE", "SUCCESS"), (2, "EXECUTE", "SUCCESS")]
        else:
            assert told == [
                (0, "EXECUTE", "SUCCESS"),
                (1, "EXECUTE", "SUCCESS"),
                (2, "EXECUTE", "FAILED"),
                (1, "COMPENSATE", "SUCCESS"),
                (0, "COMPENSATE", "SUCCESS"),
            ], json.dumps(logs)
