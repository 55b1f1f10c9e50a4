"""Every call of section 4, asked by a client over a real connection."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
import trio

from saga.model import SagaStatus
from tests.support.orchestrator import HANGS, ORDER, REFUSED
from tests.web.conftest import Site, open_site

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NO_SAGA = "00000000-0000-4000-8000-000000000000"
SAGA_FIELDS = [
    "saga_id",
    "workflow_name",
    "workflow_version",
    "current_step",
    "status",
    "payload",
    "correlation_id",
    "initiated_by",
    "error_message",
    "compensation_failed",
    "attempt",
    "next_attempt_at",
    "created_at",
    "updated_at",
]
LOG_FIELDS = [
    "id",
    "saga_id",
    "step_index",
    "step_name",
    "action",
    "status",
    "request_payload",
    "response_payload",
    "error_message",
    "attempts",
    "started_at",
    "completed_at",
]


async def failed_undo(site: Site) -> str:
    """A saga that has ended FAILED with a compensation that failed."""
    site.house.answers["Payment.Charge"] = [REFUSED]
    site.house.answers["Inventory.Release"] = [REFUSED]
    saga_id = await site.start()
    await site.ended(saga_id)
    return saga_id


async def test_post_sagas_answers_201_with_saga_id_status_and_location(site: Site) -> None:
    answer = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"})
    assert (answer.status_code, answer.headers["content-type"]) == (201, "application/json")
    assert list(answer.json()) == ["saga_id", "status"]
    assert answer.json()["status"] == "STARTED"
    assert UUID.fullmatch(answer.json()["saga_id"])
    assert answer.headers["location"] == f"/api/v1/sagas/{answer.json()['saga_id']}"


async def test_get_saga_answers_every_field_of_the_saga_and_its_step_logs(site: Site) -> None:
    saga_id = await site.start(payload={"order_id": "o-1"}, correlation_id="c-1", initiated_by="shop")
    detail: dict[str, Any] = await site.ended(saga_id)
    assert list(detail) == ["saga", "step_logs"]
    saga = detail["saga"]
    assert list(saga) == SAGA_FIELDS
    assert INSTANT.fullmatch(saga["created_at"])
    assert INSTANT.fullmatch(saga["updated_at"])
    assert {name: saga[name] for name in SAGA_FIELDS[:12]} == {
        "saga_id": saga_id,
        "workflow_name": "order",
        "workflow_version": 1,
        "current_step": 2,
        "status": "COMPLETED",
        "payload": {"order_id": "o-1"},
        "correlation_id": "c-1",
        "initiated_by": "shop",
        "error_message": None,
        "compensation_failed": False,
        "attempt": 0,
        "next_attempt_at": None,
    }
    first, second = detail["step_logs"]
    assert list(first) == LOG_FIELDS
    assert INSTANT.fullmatch(first["started_at"])
    assert INSTANT.fullmatch(first["completed_at"])
    assert UUID.fullmatch(first["id"])
    assert {name: first[name] for name in LOG_FIELDS[1:10]} == {
        "saga_id": saga_id,
        "step_index": 0,
        "step_name": "reserve",
        "action": "EXECUTE",
        "status": "SUCCESS",
        "request_payload": {"order_id": "o-1"},
        "response_payload": {"ok": True},
        "error_message": None,
        "attempts": 1,
    }
    assert (second["step_index"], second["step_name"]) == (1, "charge")


async def test_a_failed_saga_shows_its_error_and_its_compensations(site: Site) -> None:
    site.house.answers["Payment.Charge"] = [REFUSED]
    detail: dict[str, Any] = await site.ended(await site.start())
    assert detail["saga"]["status"] == "FAILED"
    assert "charge" in detail["saga"]["error_message"]
    assert "card declined" in detail["saga"]["error_message"]
    logs = [(log["step_name"], log["action"], log["status"]) for log in detail["step_logs"]]
    assert logs == [
        ("reserve", "EXECUTE", "SUCCESS"),
        ("charge", "EXECUTE", "FAILED"),
        ("reserve", "COMPENSATE", "SUCCESS"),
    ]


async def test_payload_is_an_empty_object_by_default_and_null_stands_for_no_text(site: Site) -> None:
    saga_id = await site.start(correlation_id=None, initiated_by=None)
    detail: dict[str, Any] = await site.ended(saga_id)
    assert (detail["saga"]["payload"], detail["saga"]["correlation_id"]) == ({}, None)


async def test_an_idempotency_key_replays_the_same_saga_and_another_body_is_a_conflict(site: Site) -> None:
    async def start(body: dict[str, Any], key: str = "k-1") -> httpx.Response:
        return await site.client.post("/api/v1/sagas", json=body, headers={"Idempotency-Key": key})

    first = await start({"workflow_name": "order", "payload": {"a": 1, "b": 2}})
    await site.ended(first.json()["saga_id"])
    second = await start({"payload": {"b": 2, "a": 1}, "workflow_name": "order"})
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    other = await start({"workflow_name": "order", "payload": {"a": 2}})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "SYS_SAGA_CONFLICT")
    assert (await start({"workflow_name": "order"}, "k" * 255)).status_code == 201
    too_long = await start({"workflow_name": "order"}, "k" * 256)
    assert (too_long.status_code, too_long.json()["error"]["details"][0]["field"]) == (400, "Idempotency-Key")


async def test_traceparent_is_handed_to_the_participants(site: Site) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    answer = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=headers)
    await site.ended(answer.json()["saga_id"])
    assert {call.traceparent.split("-")[1] for call in site.house.calls} == {trace}


async def test_of_two_traceparents_neither_counts_and_the_saga_is_started_all_the_same(site: Site) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = [("traceparent", f"00-{trace}-b7ad6b716920333{number}-01") for number in (1, 2)]
    answer = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=headers)
    assert answer.status_code == 201
    saga_id = answer.json()["saga_id"]
    await site.ended(saga_id)
    assert {call.traceparent.split("-")[1] for call in site.house.calls} == {saga_id.replace("-", "")}


async def test_unknown_workflow_is_404_by_name(site: Site) -> None:
    answer = await site.client.post("/api/v1/sagas", json={"workflow_name": "nope"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "SYS_SAGA_NOT_FOUND")
    assert answer.json()["error"]["message"] == "workflow not found: nope"


async def test_a_list_is_newest_first_in_pages_of_20_and_a_cursor_goes_on(site: Site) -> None:
    ids = [await site.start() for _ in range(21)]
    page = (await site.client.get("/api/v1/sagas")).json()
    assert list(page) == ["sagas", "pagination"]
    assert list(page["sagas"][0]) == SAGA_FIELDS
    assert [saga["saga_id"] for saga in page["sagas"]] == ids[:0:-1]
    cursor = page["pagination"].pop("next_cursor")
    assert page["pagination"] == {"total_count": 21, "page": 1, "page_size": 20, "has_next": True}
    rest = (await site.client.get("/api/v1/sagas", params={"cursor": cursor})).json()
    assert [saga["saga_id"] for saga in rest["sagas"]] == ids[:1]
    assert (rest["pagination"]["has_next"], rest["pagination"]["next_cursor"]) == (False, None)
    third = (await site.client.get("/api/v1/sagas", params={"page": 3, "page_size": 10})).json()
    assert [saga["saga_id"] for saga in third["sagas"]] == ids[:1]
    assert (await site.client.get("/api/v1/sagas?page_size=200")).status_code == 200


async def test_a_list_is_filtered_by_each_parameter(site: Site) -> None:
    one = await site.start(correlation_id="c-1")
    await site.start(correlation_id="c-2")
    created = (await site.ended(one))["saga"]["created_at"]  # type: ignore[index]  # JSON

    async def count(**params: str) -> int:
        answer = await site.client.get("/api/v1/sagas", params=params)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["pagination"]["total_count"])

    assert await count(correlation_id="c-1") == 1
    assert await count(workflow_name="order") == 2
    assert await count(workflow_name="other") == 0
    assert await count(status="COMPLETED", correlation_id="c-1") == 1
    assert await count(compensation_failed="false") == 2
    assert await count(compensation_failed="true") == 0
    assert await count(created_after=created) == 2
    assert await count(created_before=created) == 0
    assert await count(created_before="2999-01-01T00:00:00+09:00") == 2
    for status in SagaStatus:
        await count(status=status)


@pytest.mark.parametrize("saga_id", [NO_SAGA, "nope", "%00", "%ff", "x" * 2000, "..%2f..", " "])
async def test_an_unknown_or_malformed_id_is_404_whatever_is_asked_of_it(site: Site, saga_id: str) -> None:
    for method, path in (("GET", ""), ("POST", "/cancel"), ("POST", "/compensate"), ("POST", "/retry-compensation")):
        answer = await site.client.request(method, f"/api/v1/sagas/{saga_id}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "SYS_SAGA_NOT_FOUND"), path


async def test_a_wait_answers_when_the_saga_ends(site: Site) -> None:
    site.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await site.start()
    answers: list[str] = []

    async def wait() -> None:
        answers.append((await site.ended(saga_id))["saga"]["status"])  # type: ignore[index]  # JSON

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        while not len(site.house.service._watchers):
            await trio.lowlevel.checkpoint()
        assert (await site.client.get(f"/api/v1/sagas/{saga_id}")).json()["saga"]["status"] == "RUNNING"
        assert answers == []
        site.house.let_go.set()
    assert answers == ["FAILED"]


async def test_a_wait_answers_with_the_state_of_now_when_its_time_is_up(site: Site) -> None:
    site.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await site.start()
    answer = await site.client.get(f"/api/v1/sagas/{saga_id}?wait_secs=0.05")
    assert (answer.status_code, answer.json()["saga"]["status"]) == (200, "RUNNING")


@pytest.mark.parametrize("name", ["cancel", "compensate"])
async def test_a_cancel_and_its_alias_answer_200_and_the_saga_ends_cancelled(site: Site, name: str) -> None:
    site.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await site.start()
    answer = await site.client.post(f"/api/v1/sagas/{saga_id}/{name}")
    assert (answer.status_code, answer.json()) == (200, {"success": True, "message": f"saga {saga_id} cancelled"})
    assert (await site.ended(saga_id))["saga"]["status"] == "CANCELLED"  # type: ignore[index]  # JSON
    again = await site.client.post(f"/api/v1/sagas/{saga_id}/{name}")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "SYS_SAGA_CONFLICT")
    assert saga_id in again.json()["error"]["message"]


async def test_retry_compensation_answers_202_and_409_when_there_is_nothing_to_retry(site: Site) -> None:
    saga_id = await failed_undo(site)
    listed = (await site.client.get("/api/v1/sagas?compensation_failed=true")).json()
    assert [saga["saga_id"] for saga in listed["sagas"]] == [saga_id]
    del site.house.answers["Inventory.Release"]
    answer = await site.client.post(f"/api/v1/sagas/{saga_id}/retry-compensation")
    assert (answer.status_code, answer.json()) == (202, {"saga_id": saga_id, "status": "COMPENSATING"})
    saga: Any = (await site.ended(saga_id))["saga"]
    assert (saga["status"], saga["compensation_failed"]) == ("FAILED", False)
    nothing = await site.client.post(f"/api/v1/sagas/{saga_id}/retry-compensation")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "SYS_SAGA_CONFLICT")


async def test_a_workflow_is_registered_with_201_listed_and_read(site: Site) -> None:
    answer = await site.client.post("/api/v1/workflows", json={"workflow_yaml": ORDER})
    assert (answer.status_code, answer.json()) == (201, {"name": "order", "version": 1, "step_count": 2})
    changed = ORDER.replace("max_attempts: 1", "max_attempts: 2")
    answer = await site.client.post("/api/v1/workflows", json={"workflow_yaml": changed})
    assert (answer.status_code, answer.json()["version"]) == (201, 2)
    listed = await site.client.get("/api/v1/workflows")
    summary = {"name": "order", "version": 2, "step_count": 2, "step_names": ["reserve", "charge"]}
    assert (listed.status_code, listed.json()) == (200, {"workflows": [summary]})
    read = (await site.client.get("/api/v1/workflows/order")).json()
    assert {name: read[name] for name in summary} == summary
    assert read["steps"][0]["compensate"] == "Inventory.Release"
    assert read["steps"][0]["timeout_secs"] == 30
    assert read["steps"][1]["retry"]["max_attempts"] == 2


async def test_a_workflow_whose_name_has_a_slash_can_be_read(site: Site) -> None:
    answer = await site.client.post(
        "/api/v1/workflows", json={"workflow_yaml": ORDER.replace("order", "shop/order", 1)}
    )
    assert (answer.status_code, answer.json()["name"]) == (201, "shop/order")
    for path in ("shop/order", "shop%2Forder"):
        read = await site.client.get(f"/api/v1/workflows/{path}")
        assert (read.status_code, read.json()["name"]) == (200, "shop/order")


async def test_a_bad_workflow_is_400_with_path_line_and_column_of_every_field(site: Site) -> None:
    text = "name: x\nsteps:\n  - name: a\n    service: inventory\n    method: nope\n    retry: {max_attempts: 0}\n"
    answer = await site.client.post("/api/v1/workflows", json={"workflow_yaml": text})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "SYS_SAGA_VALIDATION_ERROR")
    found = {detail["field"]: (detail["line"], bool(detail["message"])) for detail in error["details"]}
    assert found == {"steps[0].method": (5, True), "steps[0].retry.max_attempts": (6, True)}


@pytest.mark.parametrize("name", ["nope", "a%00", "a%2Fb", "%F0%9F%98%80"])
async def test_an_unknown_workflow_is_404(site: Site, name: str) -> None:
    answer = await site.client.get(f"/api/v1/workflows/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "SYS_SAGA_NOT_FOUND")


async def test_a_payload_over_the_limit_is_413(site: Site) -> None:
    async with open_site(max_payload_bytes=1000) as small:
        body = {"workflow_name": "order", "payload": {"a": "x" * 1000}}
        answer = await small.client.post("/api/v1/sagas", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (413, "SYS_SAGA_PAYLOAD_TOO_LARGE")
        assert error["details"][0]["field"] == "payload"
