"""`/docs`: that the page has what the document has, needs nothing from anywhere else, and that its examples work."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections import Counter

import httpx
import pytest

from saga.error_codes import ERROR_CODES
from tests.web.conftest import Site
from tests.web.test_openapi import DOCUMENT, OPERATIONS, described
from web.docs_page import Json, Reading, read
from web.exchange import JSON

COMMAND = re.compile(r"<pre>(curl .*?)</pre>", re.DOTALL)


async def page_of(site: Site) -> str:
    answer = await site.client.get("/docs")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    return answer.text


async def asked(site: Site, command: str) -> httpx.Response:
    """What the server answers to a command of the page."""
    first, silent, *words = shlex.split(command)
    assert (first, silent) == ("curl", "-s")
    headers, method, body, url = [], "GET", None, ""
    while words:
        word = words.pop(0)
        if word == "-H":
            name, _, value = words.pop(0).partition(": ")
            headers.append((name, value))
        elif word == "-X":
            method = words.pop(0)
        elif word == "-d":
            method, body = "POST", words.pop(0)
        elif word != "\n":
            url = word
    path = url.removeprefix("$SAGA")
    assert path != url
    return await site.client.request(method, path, headers=headers, content=body)


async def test_every_call_error_and_type_has_a_place_of_its_own_and_every_link_leads_to_one(site: Site) -> None:
    page = await page_of(site)
    ids = Counter(re.findall(r'id="([^"]*)"', page))
    assert set(ids.values()) == {1}
    told = {operation.name for operation in OPERATIONS} | {tag["name"] for tag in DOCUMENT["tags"]}
    told |= {*DOCUMENT["components"]["schemas"], *DOCUMENT["components"]["responses"]}
    assert told <= set(ids)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


async def test_a_call_is_shown_with_who_may_do_it_its_parameters_and_its_answers(site: Site) -> None:
    page = await page_of(site)
    for operation in OPERATIONS:
        (shown,) = re.findall(rf'<article id="{operation.name}">(.*?)</article>', page, re.DOTALL)
        found = described(operation)
        assert f'<span class="status {operation.method}">{operation.method}</span> <code>{operation.path}<' in shown
        assert html.escape(operation.summary.split("`")[0]) in shown
        assert (f"permission to {operation.permission.value}" in shown) == bool(found["security"])
        for parameter in found["parameters"]:
            assert f"<code>{parameter.get('name', 'X-Request-Id')}</code>" in shown
        for status in found["responses"]:
            assert re.search(rf">{status}[ <]", shown), (operation.name, status)
    for told in ERROR_CODES.values():
        assert re.search(rf"<code>{told.code}</code></td><td>{told.http_status}</td>.*{told.grpc_status}", page)


async def test_the_page_asks_for_nothing_but_the_style_of_the_pages(site: Site) -> None:
    page = await page_of(site)
    assert set(re.findall(r'(?:src|href|action)="([^#"]+)"', page)) == {
        "/", "/audit", "/docs", "/metrics", "/openapi.json", "/readyz", "/static/style.css", "data:,"
    }  # fmt: skip
    assert "<script" not in page
    assert "style=" not in page


async def test_the_pages_lead_to_it(site: Site) -> None:
    for path in ("/", "/audit", "/sagas/nope", "/sign-in"):
        assert 'href="/docs"' in (await site.client.get(path)).text


async def test_every_command_of_the_page_works(site: Site) -> None:
    commands = [html.unescape(command) for command in COMMAND.findall(await page_of(site))]
    bodies = [described(each).get("requestBody", {}).get("content", {}).get(JSON, {}) for each in OPERATIONS]
    assert len(commands) == sum(len(body.get("examples", "-")) for body in bodies)
    (registers,) = (command for command in commands if "workflow_yaml" in command)
    assert (await asked(site, registers)).status_code == 201
    statuses = {}
    for command in commands:
        answer = await asked(site, command)
        # The saga of the examples is none of this server.
        expected = {404} if "/api/v1/sagas/" in command else {200, 201}
        assert answer.status_code in expected, (command, answer.text)
        statuses[command] = answer.status_code
    assert set(statuses.values()) == {200, 201, 404}
    started = json.loads((await site.client.get("/api/v1/sagas?correlation_id=A-1005")).text)
    assert started["sagas"][0]["workflow_name"] == "order-fulfillment"


async def test_it_is_put_together_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    put_together = 0

    def counted(document: Json) -> Reading:
        nonlocal put_together
        put_together += 1
        return read(document)

    monkeypatch.setattr("web.docs_page.read", counted)
    assert await page_of(site) == await page_of(site)
    assert put_together == 1
