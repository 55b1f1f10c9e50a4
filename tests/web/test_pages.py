"""What the pages tell of sagas that are being undone, and when something is wrong."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import msgspec
import pytest
import trio

from saga.errors import Unavailable
from saga.ports import Answer, Outcome
from tests.support.issuer import Issuer, token_of
from tests.support.orchestrator import HANGS, REFUSED
from tests.web.conftest import Site, guarded_site


async def page_when(site: Site, saga_id: str, text: str) -> str:
    """The saga's page, when it says `text`."""
    with trio.fail_after(10):
        while text not in (page := (await site.client.get(f"/sagas/{saga_id}")).text):
            await trio.lowlevel.checkpoint()
    return page


async def test_the_page_tells_which_undo_is_in_hand_and_its_attempt(site: Site) -> None:
    site.house.answers |= {"Payment.Charge": [REFUSED], "Inventory.Release": [HANGS]}
    saga_id = await site.start()
    page = await page_when(site, saga_id, "COMPENSATING")
    reserve, charge = re.findall(r"<tr>\s*<td>\d</td>(.*?)</tr>", page, re.S)
    assert re.search(r"attempt 1\s*<small>by Inventory.Release", reserve)
    assert "attempt" not in charge


async def test_an_undo_that_runs_again_is_not_shown_as_failed_meanwhile(site: Site) -> None:
    site.house.answers |= {"Payment.Charge": [REFUSED], "Inventory.Release": [REFUSED, HANGS]}
    saga_id = await site.start()
    await site.ended(saga_id)
    assert "An undo failed." in (await site.client.get(f"/sagas/{saga_id}")).text
    answer = await site.client.post(f"/api/v1/sagas/{saga_id}/retry-compensation")
    assert answer.status_code == 202
    page = await page_when(site, saga_id, "attempt 1")
    reserve = re.findall(r"<tr>\s*<td>\d</td>(.*?)</tr>", page, re.S)[0]
    assert re.search(r"attempt 1\s*<small>by Inventory.Release", reserve)
    assert "FAILED" not in reserve


async def test_the_page_says_that_a_cancellation_was_asked_for(site: Site) -> None:
    site.house.answers |= {"Payment.Charge": [HANGS], "Inventory.Release": [HANGS]}
    saga_id = await site.start()
    assert "Cancellation was asked for" not in await page_when(site, saga_id, "RUNNING")
    assert (await site.client.post(f"/api/v1/sagas/{saga_id}/cancel")).status_code == 200
    assert "Cancellation was asked for" in (await site.client.get(f"/sagas/{saga_id}")).text


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
HOSTILE_WORKFLOW = f"""
name: {msgspec.json.encode("w" + HOSTILE).decode()}
steps:
  - name: {msgspec.json.encode("s" + HOSTILE).decode()}
    service: inventory
    method: Inventory.Reserve
    compensate: Inventory.Release
    compensate_retry: {{max_attempts: 1}}
  - {{name: charge, service: payment, method: Payment.Charge, retry: {{max_attempts: 1}}}}
"""


async def test_nothing_that_anybody_says_becomes_markup(idp: Issuer) -> None:
    said = Answer(outcome=Outcome.REFUSED, code="FAILED_PRECONDITION", message="m" + HOSTILE)
    async with guarded_site(idp) as site:
        site.client.headers["Authorization"] = f"Bearer {token_of('sys_admin', sub='p' + HOSTILE)}"
        site.house.answers |= {"Payment.Charge": [said], "Inventory.Release": [said]}
        registered = await site.client.post("/api/v1/workflows", json={"workflow_yaml": HOSTILE_WORKFLOW})
        assert registered.status_code == 201, registered.text
        saga_id = await site.start(
            workflow_name="w" + HOSTILE,
            payload={"k" + HOSTILE: "v" + HOSTILE},
            correlation_id="c" + HOSTILE,
            initiated_by="i" + HOSTILE,
        )
        await site.ended(saga_id)
        steps = {"s" + HOSTILE: {"mark_done": True, "reason": "r" + HOSTILE}}
        await site.client.post(f"/api/v1/sagas/{saga_id}/retry-compensation", json={"steps": steps})
        query = urlencode({"q": "x" + HOSTILE})[2:]
        pages = {
            path: (await site.client.get(path)).text
            for path in (
                "/",
                f"/sagas/{saga_id}",
                "/audit",
                f"/?workflow_name={query}&correlation_id={query}",
                f"/?status={query}",
                f"/?cursor={query}",
                f"/audit?principal={query}",
                f"/sagas/{query}",
            )
        }
        del site.client.headers["Authorization"]
        pages["sign in"] = (await site.client.get(f"/?x={query}")).text
        pages["sign in again"] = (await site.client.post("/sign-in", data={"token": "x", "next": HOSTILE})).text
    for path, page in pages.items():
        assert not any(markup in page for markup in ("<script>", "<img", "\"'>")), path
    # It is shown all the same, as what it is.
    shown = pages["/audit"] + pages[f"/sagas/{saga_id}"]
    assert {said for said in "wsmkvcipr" if said + "&lt;script&gt;" in shown} == set("wsmkvcipr")


async def test_every_page_tells_the_browser_to_load_run_frame_and_keep_nothing_else(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        signed_in = {"Authorization": f"Bearer {token_of('sys_auditor')}"}
        answers = [
            await site.client.get(path, headers=signed_in) for path in ("/", "/audit", "/sagas/none", "/?page=x")
        ]
        answers += [await site.client.get(path) for path in ("/", "/sign-in", "/docs")]
        answers += [await site.client.post("/sign-in", data={"token": token_of("sys_auditor")})]
        answers += [await site.client.post("/sign-out")]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 400, 401, 200, 200, 303, 303]
    for answer in answers:
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'", answer.url
        assert policy["script-src"] == policy["form-action"] == "'self'", answer.url
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/sagas/00000000-0000-4000-8000-000000000000", "/audit"])
async def test_a_page_that_cannot_be_made_is_a_page_too(site: Site, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object, **__: object) -> None:
        raise Unavailable("the database cannot be reached", "10.1.2.3 refuses")

    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("<secret>")

    for method in ("list_sagas", "get", "list_audit"):
        monkeypatch.setattr(site.house.store, method, away)
    page = await site.client.get(path)
    assert (page.status_code, page.headers["retry-after"]) == (503, "1")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "the database cannot be reached" in page.text
    assert "10.1.2.3" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for method in ("list_sagas", "get", "list_audit"):
        monkeypatch.setattr(site.house.store, method, broken)
    page = await site.client.get(path, headers={"X-Request-Id": "find-me"})
    assert (page.status_code, page.headers["content-type"]) == (500, "text/html; charset=utf-8")
    assert "find-me" in page.text
    assert "secret" not in page.text
