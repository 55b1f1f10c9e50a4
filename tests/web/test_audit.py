"""The audit log at the REST door and on the pages, with real tokens."""

from __future__ import annotations

from typing import Any

import pytest

from saga.payload_mask import PayloadMask
from tests.support.issuer import Issuer, token_of
from tests.support.orchestrator import HANGS, ORDER, REFUSED
from tests.web.conftest import Site, guarded_site, open_site

NO_SAGA = "00000000-0000-4000-8000-000000000000"


def as_(subject: str, *roles: str, request_id: str = "r-1") -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(*roles, sub=subject)}", "X-Request-Id": request_id}


ALICE, AUDITOR = as_("alice", "sys_operator", "other"), as_("eve", "sys_auditor", request_id="r-2")


async def audited(site: Site, **query: str) -> list[dict[str, Any]]:
    """Without the workflow that the site begins with."""
    answer = await site.client.get("/api/v1/audit", params=query, headers=AUDITOR)
    assert answer.status_code == 200, answer.text
    return [entry for entry in answer.json()["entries"] if entry["door"] != "PROCESS"]


async def test_every_change_is_told_with_who_asked_for_it(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        site.house.answers |= {"Payment.Charge": [REFUSED], "Inventory.Release": [REFUSED]}
        started = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=ALICE)
        saga = f"/api/v1/sagas/{started.json()['saga_id']}"
        ended = await site.client.get(saga, params={"wait_secs": 10}, headers=ALICE)
        assert ended.json()["saga"]["compensation_failed"]
        assert ended.json()["saga"]["initiated_by"] == "alice"
        steps = {"reserve": {"mark_done": True, "reason": "freed by hand"}}
        again = await site.client.post(f"{saga}/retry-compensation", json={"steps": steps}, headers=ALICE)
        assert again.status_code == 202, again.text
        text = ORDER.replace("max_attempts: 1", "max_attempts: 2")
        await site.client.post("/api/v1/workflows", json={"workflow_yaml": text}, headers=ALICE)
        entries = await audited(site)
        assert [(entry["action"], entry["outcome"], entry["principal"]) for entry in entries] == [
            ("REGISTER_WORKFLOW", "DONE", "alice"),
            ("MARK_DONE", "DONE", "alice"),
            ("RETRY_COMPENSATION", "DONE", "alice"),
            ("START_SAGA", "DONE", "alice"),
        ]
        assert entries[1]["step_name"] == "reserve"
        assert entries[1]["reason"] == "freed by hand"
        first = entries[-1]
        assert first.pop("id").isdecimal()
        assert first.pop("created_at") == ended.json()["saga"]["created_at"]
        assert first == {
            "action": "START_SAGA",
            "outcome": "DONE",
            "principal": "alice",
            "roles": ["sys_operator"],
            "door": "REST",
            "address": "127.0.0.1",
            "request_id": "r-1",
            "saga_id": started.json()["saga_id"],
            "workflow_name": "order",
            "workflow_version": 1,
            "step_name": None,
            "reason": None,
            "before": None,
            "after": {"status": "STARTED", "revision": 0},
        }


@pytest.mark.parametrize("path", ["cancel", "compensate"])
async def test_a_cancel_is_told_with_its_reason(idp: Issuer, path: str) -> None:
    async with guarded_site(idp) as site:
        site.house.answers["Inventory.Reserve"] = [HANGS]
        for body, reason in (({"reason": "by phone"}, "by phone"), ({}, None)):
            started = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=ALICE)
            url = f"/api/v1/sagas/{started.json()['saga_id']}/{path}"
            for wrong in ({"reason": " "}, {"reason": None}, {"raeson": "by phone"}, ["by phone"]):
                assert (await site.client.post(url, json=wrong, headers=ALICE)).status_code == 400
            assert (await site.client.post(url, json=body, headers=ALICE)).status_code == 200
            entry = (await audited(site))[0]
            assert (entry["action"], entry["reason"]) == ("CANCEL_SAGA", reason)


@pytest.mark.parametrize(
    ("path", "action", "saga_id"),
    [
        ("/api/v1/sagas", "START_SAGA", None),
        (f"/api/v1/sagas/{NO_SAGA}/cancel", "CANCEL_SAGA", NO_SAGA),
        (f"/api/v1/sagas/{NO_SAGA}/compensate", "CANCEL_SAGA", NO_SAGA),
        (f"/api/v1/sagas/{NO_SAGA}/retry-compensation", "RETRY_COMPENSATION", NO_SAGA),
        ("/api/v1/workflows", "REGISTER_WORKFLOW", None),
    ],
)
async def test_a_change_that_was_denied_is_told_too(idp: Issuer, path: str, action: str, saga_id: str | None) -> None:
    async with guarded_site(idp) as site:
        refused = await site.client.post(path, json={}, headers=AUDITOR)
        assert refused.status_code == 403
        (entry,) = await audited(site)
        assert (entry["action"], entry["outcome"], entry["saga_id"]) == (action, "DENIED", saga_id)
        assert (entry["principal"], entry["roles"], entry["request_id"]) == ("eve", ["sys_auditor"], "r-2")


async def test_reads_strangers_and_what_cannot_be_leave_no_entry(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        nobody = as_("nobody")
        assert (await site.client.get("/api/v1/sagas", headers=nobody)).status_code == 403
        assert (await site.client.get("/api/v1/audit", headers=nobody)).status_code == 403
        assert (await site.client.post("/api/v1/sagas", json={"workflow_name": "order"})).status_code == 401
        assert (await site.client.post("/api/v1/sagas", json={}, headers=ALICE)).status_code == 400
        assert (await site.client.post(f"/api/v1/sagas/{NO_SAGA}/cancel", headers=ALICE)).status_code == 404
        assert await audited(site) == []


async def test_the_log_is_filtered_and_continued_by_a_cursor(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        ids = []
        for subject in ("alice", "bob", "alice"):
            body = {"workflow_name": "order"}
            answer = await site.client.post("/api/v1/sagas", json=body, headers=as_(subject, "sys_admin"))
            ids.append(answer.json()["saga_id"])
        assert [entry["saga_id"] for entry in await audited(site, principal="alice")] == [ids[2], ids[0]]
        assert [entry["principal"] for entry in await audited(site, saga_id=ids[1])] == ["bob"]
        query: dict[str, Any] = {"action": "START_SAGA", "page_size": 2}
        page = (await site.client.get("/api/v1/audit", params=query, headers=AUDITOR)).json()
        assert page["pagination"]["page_size"] == 2
        assert page["pagination"]["has_next"] is True
        query["cursor"] = page["pagination"]["next_cursor"]
        rest = (await site.client.get("/api/v1/audit", params=query, headers=AUDITOR)).json()
        assert [entry["saga_id"] for entry in page["entries"] + rest["entries"]] == ids[::-1]
        assert rest["pagination"] == {"page_size": 2, "has_next": False, "next_cursor": None}
        assert await audited(site, created_before="2020-01-01T00:00:00Z") == []
        assert len(await audited(site, created_after="2020-01-01T00:00:00Z")) == 3


@pytest.mark.parametrize("query", ["action=DROP", "page_size=0", "saga_id=x", "cursor=x", "page=2", "principal="])
async def test_a_query_that_cannot_be_is_400(site: Site, query: str) -> None:
    answer = await site.client.get(f"/api/v1/audit?{query}")
    assert answer.status_code == 400
    assert [detail["field"] for detail in answer.json()["error"]["details"]] == [query.partition("=")[0]]


async def test_without_access_control_everybody_is_anonymous_and_initiates_nothing(site: Site) -> None:
    saga_id = await site.start()
    entries = (await site.client.get("/api/v1/audit", params={"saga_id": saga_id})).json()["entries"]
    assert [(entry["principal"], entry["roles"]) for entry in entries] == [("anonymous", [])]
    assert (await site.ended(saga_id))["saga"]["initiated_by"] is None  # type: ignore[index]  # JSON


# --- pages ------------------------------------------------------------------------------------------------------------


async def test_the_page_of_a_saga_tells_who_asked_for_what(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        started = await site.client.post(
            "/api/v1/sagas", json={"workflow_name": "order"}, headers=as_("<b>bob</b>", "sys_admin")
        )
        page = await site.client.get(f"/sagas/{started.json()['saga_id']}", headers=AUDITOR)
        assert page.status_code == 200
        assert "START_SAGA" in page.text
        assert "&lt;b&gt;bob&lt;/b&gt;" in page.text
        assert "<b>bob" not in page.text


async def test_the_page_of_the_log_is_for_those_who_may_read_it(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        await site.client.post(f"/api/v1/sagas/{NO_SAGA}/cancel", headers=AUDITOR)
        for _ in range(3):
            await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=ALICE)
        assert (await site.client.get("/audit")).status_code == 401
        page = await site.client.get("/audit", headers=AUDITOR)
        assert page.status_code == 200
        assert "DENIED" in page.text
        assert page.text.count("<td>alice") == 3
        only = await site.client.get("/audit?action=CANCEL_SAGA&principal=&saga_id=", headers=AUDITOR)
        assert "alice" not in only.text
        first = await site.client.get("/audit?page_size=1", headers=AUDITOR)
        assert "/audit?page_size=1&amp;cursor=" in first.text
        assert (await site.client.get("/audit?action=DROP", headers=AUDITOR)).status_code == 400


async def test_pages_do_not_show_what_is_to_be_masked_and_the_api_does() -> None:
    async with open_site(payload_mask=PayloadMask(["card"])) as site:
        site.house.answers |= {"Payment.Charge": [REFUSED_CARD]}
        saga_id = await site.start(payload={"deep": [{"card": "4111-1111"}]})
        ended = await site.ended(saga_id)
        assert str(ended).count("4111-1111") >= 3
        page = (await site.client.get(f"/sagas/{saga_id}")).text
        assert "4111" not in page
        assert "card" in page
        assert "***" in page


async def test_to_ask_which_methods_there_are_is_no_change_that_was_denied(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for path in ("/api/v1/sagas", "/api/v1/workflows", "/api/v1/sagas/x/cancel"):
            await site.client.options(path, headers=AUDITOR)
        assert await audited(site) == []


async def test_a_reason_enters_the_audit_log_without_what_is_to_be_masked() -> None:
    async with open_site(payload_mask=PayloadMask(["card"])) as site:
        site.house.answers |= {"Payment.Charge": [REFUSED], "Inventory.Release": [REFUSED]}
        saga_id = await site.start()
        await site.ended(saga_id)
        done = {"mark_done": True, "reason": "refunded by hand, card=4111-1111, ticket 4711"}
        answer = await site.client.post(
            f"/api/v1/sagas/{saga_id}/retry-compensation", json={"steps": {"reserve": done}}
        )
        assert answer.status_code == 202
        entries = (await site.client.get("/api/v1/audit")).json()["entries"]
        reasons = [entry["reason"] for entry in entries if entry["reason"]]
        assert reasons == ["refunded by hand, card=***, ticket 4711"]
        for page in (f"/sagas/{saga_id}", "/audit"):
            text = (await site.client.get(page)).text
            assert ("4111" in text, "ticket 4711" in text) == (False, True)


REFUSED_CARD = type(REFUSED)(outcome=REFUSED.outcome, code=REFUSED.code, message="bad card=4111-1111")
