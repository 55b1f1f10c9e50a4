"""What is corrected about failed compensations, over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.orchestrator import REFUSED
from tests.web.conftest import Site, open_site
from tests.web.test_bad_requests import error_of


async def failed_undo(site: Site) -> str:
    """A saga whose only undo, that of `reserve`, has failed; the next one works."""
    site.house.answers["Payment.Charge"] = [REFUSED]
    site.house.answers["Inventory.Release"] = [REFUSED]
    saga_id = await site.start(payload={"order_id": "o-1"})
    detail: Any = await site.ended(saga_id)
    assert detail["saga"]["compensation_failed"] is True
    del site.house.answers["Inventory.Release"]
    site.house.calls.clear()
    return saga_id


async def retry(site: Site, saga_id: str, body: Any) -> httpx.Response:
    return await site.client.post(f"/api/v1/sagas/{saga_id}/retry-compensation", json=body)


async def last_log(site: Site, saga_id: str) -> dict[str, Any]:
    detail: Any = await site.ended(saga_id)
    assert detail["saga"]["compensation_failed"] is False
    log: dict[str, Any] = detail["step_logs"][-1]
    return {
        name: log[name] for name in ("step_name", "action", "status", "attempts", "request_payload", "error_message")
    }


async def test_a_corrected_request_is_sent_and_logged(site: Site) -> None:
    saga_id = await failed_undo(site)
    answer = await retry(site, saga_id, {"steps": {"reserve": {"input": {"receipt_id": "r-7"}}}})
    assert (answer.status_code, answer.json()) == (202, {"saga_id": saga_id, "status": "COMPENSATING"})
    assert await last_log(site, saga_id) == {
        "step_name": "reserve",
        "action": "COMPENSATE",
        "status": "SUCCESS",
        "attempts": 1,
        "request_payload": {"receipt_id": "r-7"},
        "error_message": None,
    }
    assert [(call.method, call.request) for call in site.house.calls] == [("Inventory.Release", {"receipt_id": "r-7"})]


async def test_an_undo_done_by_hand_is_logged_with_its_reason_and_calls_nobody(site: Site) -> None:
    saga_id = await failed_undo(site)
    done = {"steps": {"reserve": {"mark_done": True, "reason": "freed by hand, ticket 4711"}}}
    answer = await retry(site, saga_id, done)
    assert (answer.status_code, answer.json()) == (202, {"saga_id": saga_id, "status": "FAILED"})
    assert await last_log(site, saga_id) == {
        "step_name": "reserve",
        "action": "COMPENSATE",
        "status": "SUCCESS",
        "attempts": 0,
        "request_payload": None,
        "error_message": "done by hand: freed by hand, ticket 4711",
    }
    assert site.house.calls == []
    error_of(await retry(site, saga_id, done), 409)
    assert 'saga_finished_total{status="FAILED",workflow="order"} 2.0' in site.meter.render().decode()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"steps": {}}'])
async def test_without_corrections_it_runs_again_as_it_was(site: Site, body: bytes) -> None:
    saga_id = await failed_undo(site)
    answer = await site.client.post(f"/api/v1/sagas/{saga_id}/retry-compensation", content=body)
    assert answer.status_code == 202
    assert (await last_log(site, saga_id))["request_payload"] == {"order_id": "o-1"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (
            {
                "steps": {
                    "reserve": {"input": [], "mark_done": True, "why": "x"},
                    "charge": {"mark_done": True},
                    "nope": {"input": {}},
                }
            },
            {
                ("steps.reserve", "both"),
                ("steps.reserve.input", "type"),
                ("steps.reserve.why", "unknown"),
                ("steps.reserve.reason", "required"),
                ("steps.charge", "not_failed"),
                ("steps.charge.reason", "required"),
                ("steps.nope", "unknown"),
            },
        ),
        ({"steps": []}, {("steps", "type")}),
        ({"steps": None}, {("steps", "type")}),
        ({"step": {}}, {("step", "unknown")}),
        ([], {("", "type")}),
        ("x", {("", "type")}),
    ],
)
async def test_every_fault_of_a_correction_is_told_by_its_path_and_nothing_is_run(
    site: Site, body: Any, found: set[tuple[str, str]]
) -> None:
    saga_id = await failed_undo(site)
    error = error_of(await retry(site, saga_id, body), 400)
    assert {(detail["field"], detail["reason"]) for detail in error["details"]} == found
    assert site.house.calls == []
    assert (await retry(site, saga_id, {})).status_code == 202


async def test_a_correction_over_the_limit_of_a_payload_is_413() -> None:
    async with open_site(max_payload_bytes=100) as site:
        saga_id = await failed_undo(site)
        body: dict[str, Any] = {"steps": {"reserve": {"input": {"x": "y" * 100}}}}
        assert [detail["field"] for detail in error_of(await retry(site, saga_id, body), 413)["details"]] == [
            "steps.reserve.input"
        ]


async def test_corrections_of_a_saga_with_nothing_to_retry_are_409_and_of_none_404(site: Site) -> None:
    saga_id = await site.start()
    await site.ended(saga_id)
    body: dict[str, Any] = {"steps": {"reserve": {"input": {}}}}
    error_of(await retry(site, saga_id, body), 409)
    error_of(await retry(site, "00000000-0000-4000-8000-000000000000", body), 404)


async def test_the_document_shows_what_a_correction_is(site: Site) -> None:
    document = (await site.client.get("/openapi.json")).json()
    call = document["paths"]["/api/v1/sagas/{saga_id}/retry-compensation"]["post"]
    assert call["requestBody"]["required"] is False
    assert set(call["responses"]) == {"202", "400", "401", "403", "404", "409", "413", "500", "503"}
    steps = document["components"]["schemas"]["RetryCompensationBody"]["properties"]["steps"]
    assert set(steps["additionalProperties"]["properties"]) == {"input", "mark_done", "reason"}
    assert steps["additionalProperties"]["additionalProperties"] is False
