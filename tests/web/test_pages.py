"""What the pages tell of sagas that are being undone, and when something is wrong."""

from __future__ import annotations

import re

import pytest
import trio

from saga.errors import Unavailable
from tests.support.orchestrator import HANGS, REFUSED
from tests.web.conftest import Site


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
