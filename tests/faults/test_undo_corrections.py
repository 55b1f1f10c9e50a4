"""Corrections of a failed undo, from the operator's request to the participant, and over a SIGKILL between the two.

Real server processes on both stores, a real participant that speaks protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    compensate_retry: {max_attempts: 1}
  - name: ship
    service: shop
    method: Shipping.Ship
    retry: {max_attempts: 1}
"""
REFUSES = {"status": "FAILED_PRECONDITION", "message": "no such receipt"}
NOTHING_CAN_BE_UNDONE: Script = {
    "Ship": [REFUSES], "Release": [REFUSES], "Refund": [REFUSES], "*": [{"once": True}]
}  # fmt: skip
PAYLOAD = {"order_id": "o-1", "amount": "100"}


@contextmanager
def failed_undo(folder: Path, store_config: dict[str, str]) -> Iterator[tuple[ServerProcess, Participant, str]]:
    """A server, its participant, and a saga that ended with both of its undos failed."""
    with participant(flavour="grpcio", script=NOTHING_CAN_BE_UNDONE) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"lease_secs": 1.0}}
        with server_process(folder, config, env=store_config) as server:
            server.start()
            server.register(TRIP)
            saga_id = server.start_saga("trip", PAYLOAD)
            saga = server.ended(saga_id)["saga"]
            assert (saga["status"], saga["compensation_failed"]) == ("FAILED", True)
            yield server, shop, saga_id


def retry(server: ServerProcess, saga_id: str, steps: dict[str, Any]) -> tuple[int, Any]:
    return server.call("POST", f"/api/v1/sagas/{saga_id}/retry-compensation", {"steps": steps})


def last_logs(detail: dict[str, Any], count: int) -> list[tuple[str, str, int, Any, str | None]]:
    return [
        (log["step_name"], log["status"], log["attempts"], log["request_payload"], log["error_message"])
        for log in detail["step_logs"][-count:]
    ]


def test_a_correction_answered_202_reaches_the_participant_though_the_server_is_killed_before_its_call(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    with failed_undo(tmp_path, store_config) as (server, shop, saga_id):
        shop.script({"Refund": [{"hang": True}], "*": [{"once": True}]})
        corrected = {"order_id": "o-1", "note": "receipt r-7"}
        answer = retry(server, saga_id, {"reserve": {"input": corrected, "reason": "typo in the receipt"}})
        assert answer == (202, {"saga_id": saga_id, "status": "COMPENSATING"})
        # The refund comes first and hangs; the release that is corrected has not been called when the server dies.
        while len(shop.calls("Refund")) < 2:
            pass
        server.kill()
        assert len(shop.calls("Release")) == 1
        shop.script({"*": [{"once": True}]})
        server.start()
        detail = server.ended(saga_id)
        assert (detail["saga"]["status"], detail["saga"]["compensation_failed"]) == ("FAILED", False)
        first, second = shop.calls("Release")
        assert [call.request.get("note") for call in (first, second)] == [None, "receipt r-7"]
        assert first.metadata["idempotency-key"] == second.metadata["idempotency-key"] == f"{saga_id}:0:compensate"
        assert last_logs(detail, 2) == [
            ("charge", "SUCCESS", 1, PAYLOAD, None),
            ("reserve", "SUCCESS", 1, corrected, "request corrected: typo in the receipt"),
        ]


def test_a_correction_that_fails_too_leaves_the_rest_done_and_can_be_followed_by_a_mark(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    with failed_undo(tmp_path, store_config) as (server, shop, saga_id):
        shop.script({"*": [{"once": True}]})
        # A correction is no payload: what the request message lacks is refused and not dropped.
        wrong = {"order_id": "o-1", "receipt": "r-7"}
        by_hand = {"mark_done": True, "reason": "refunded at the desk"}
        assert retry(server, saga_id, {"reserve": {"input": wrong}, "charge": by_hand})[0] == 202
        detail = server.ended(saga_id)
        assert detail["saga"]["compensation_failed"] is True
        charge, reserve = last_logs(detail, 2)
        assert charge == ("charge", "SUCCESS", 0, None, "done by hand: refunded at the desk")
        assert reserve[:4] == ("reserve", "FAILED", 1, wrong)
        assert "receipt" in (reserve[4] or "")
        # The refund is done for good and cannot be corrected any more.
        status, answer = retry(server, saga_id, {"charge": by_hand})
        assert (status, [detail["field"] for detail in answer["error"]["details"]]) == (400, ["steps.charge"])
        assert retry(server, saga_id, {"reserve": by_hand}) == (202, {"saga_id": saga_id, "status": "FAILED"})
        server.kill()
        server.start()
        detail = server.ended(saga_id)
        assert detail["saga"]["compensation_failed"] is False
        assert last_logs(detail, 1) == [("reserve", "SUCCESS", 0, None, "done by hand: refunded at the desk")]
        assert retry(server, saga_id, {})[0] == 409
        assert [len(shop.calls(method)) for method in ("Release", "Refund")] == [1, 1]
