"""The REST door and its guard: who is let in to which operation, and what the others are told (spec sections 4, 9)."""

from __future__ import annotations

import time
from typing import Any, cast

import httpx
import pytest
import trio
from quart_trio import QuartTrio

from saga.access import Permission
from saga.authentication import OpenAccess
from saga.drain import Drain
from saga.ports import SagaFilter
from server import jwks
from server.tokens import LEEWAY_SECS
from tests.support.bad_tokens import DENIED, INVALID, MISSING, bad_tokens
from tests.support.issuer import Issuer, issuer, token, token_of
from tests.support.orchestrator import HANGS, ORDER
from tests.support.verifier import verifier
from tests.web.conftest import Site, guarded_site, open_site
from tests.web.raw import H2Client, exchange
from web.api import Api, Operation
from web.app import DOCUMENTS, create_app
from web.pages import PAGES
from web.sign_in import SIGN_IN

ASKS = {
    "startSaga": "write sagas",
    "listSagas": "read sagas",
    "getSaga": "read sagas",
    "cancelSaga": "write sagas",
    "compensateSaga": "write sagas",
    "retryCompensation": "write sagas",
    "registerWorkflow": "write workflows",
    "listWorkflows": "read workflows",
    "getWorkflow": "read workflows",
    "listAudit": "read audit",
    "healthz": "open",
    "readyz": "open",
}
"""Spec section 9, by operation; one that is not here fails a test."""

READS = {"open", "read sagas", "read workflows", "read audit"}
MAY = {
    "sys_auditor": READS,
    "sys_operator": READS | {"write sagas", "write workflows"},
    "sys_admin": READS | {"write sagas", "write workflows"},
}

OPEN_ROUTES = {
    "healthz",
    "readyz",
    "openapi_json",
    "docs_page",
    "metrics",
    "static",
    "sign_in_page",
    "sign_in",
    "sign_out",
}

BODIES: dict[str, Any] = {"startSaga": {"workflow_name": "order"}, "registerWorkflow": {"workflow_yaml": ORDER}}
NO_SAGA = "00000000-0000-4000-8000-000000000000"


def operations() -> tuple[Operation, ...]:
    return Api(cast(Any, None), Drain(), cast(Any, None)).operations


def guarded() -> list[Operation]:
    return [operation for operation in operations() if operation.permission is not Permission.OPEN]


async def ask(site: Site, operation: Operation, authorization: str | list[str] | None) -> httpx.Response:
    values = [authorization] if isinstance(authorization, str) else authorization or []
    return await site.client.request(
        operation.method,
        operation.path.replace("{saga_id}", NO_SAGA).replace("{name}", "order"),
        json=BODIES.get(operation.name),
        headers=[("Authorization", value) for value in values],
    )


def code(answer: httpx.Response) -> str:
    told: str = answer.json()["error"]["code"]
    return told


def test_every_operation_asks_what_the_specification_says() -> None:
    assert {operation.name: operation.permission.value for operation in operations()} == ASKS


def bare_app() -> QuartTrio:
    service = cast(Any, type("Service", (), {"max_payload_bytes": 1}))
    return create_app(service, authenticator=OpenAccess(), drain=Drain(), version="1")


def test_every_route_says_what_it_asks_and_no_more_are_open_than_there_should_be() -> None:
    declared = {operation.name: operation.permission for operation in operations()}
    declared |= {**DOCUMENTS, **PAGES, **SIGN_IN}
    assert {rule.endpoint for rule in bare_app().url_map.iter_rules()} == set(declared)
    assert {name for name, permission in declared.items() if permission is Permission.OPEN} == OPEN_ROUTES


async def test_a_route_nobody_declared_anything_about_is_refused_even_without_access_control() -> None:
    app = bare_app()

    async def forgotten() -> str:
        raise AssertionError("it is served")

    app.add_url_rule("/forgotten", view_func=forgotten)
    answer = await app.test_client().get("/forgotten")
    assert answer.status_code == 403


async def test_every_bad_token_is_refused_at_every_operation_with_its_code(idp: Issuer) -> None:
    wrong: dict[str, Any] = {}
    async with guarded_site(idp) as site:
        table = bad_tokens()
        for name, (authorization, expected) in table.items():
            for operation in guarded():
                answer = await ask(site, operation, authorization)
                challenge = answer.headers.get("WWW-Authenticate", "")
                right = (
                    answer.status_code == (403 if expected == DENIED else 401)
                    and code(answer) == expected
                    and challenge.startswith('Bearer realm="saga"')
                    and ("error=" in challenge) == (expected != MISSING)
                )
                if not right:
                    wrong[f"{operation.name}: {name}"] = (answer.status_code, answer.text, challenge)
        assert wrong == {}
        assert len(table) >= 40
        # None of them has done anything.
        found = await site.house.service.list_sagas(SagaFilter())
        assert found.total_count == 0
        (workflow,) = await site.house.service.workflows()
        assert workflow.version == 1


@pytest.mark.parametrize("role", sorted(MAY))
async def test_each_role_may_do_exactly_what_the_matrix_says(idp: Issuer, role: str) -> None:
    async with guarded_site(idp) as site:
        good = f"Bearer {token_of(role)}"
        told = {operation.name: await ask(site, operation, good) for operation in operations()}
    allowed = {name for name, answer in told.items() if answer.status_code not in (401, 403)}
    assert allowed == {name for name, asks in ASKS.items() if asks in MAY[role]}
    assert {code(answer) for name, answer in told.items() if name not in allowed} <= {DENIED}
    assert told["listSagas"].status_code == told["getWorkflow"].status_code == 200
    assert told["startSaga"].status_code == (201 if "write sagas" in MAY[role] else 403)
    assert told["getSaga"].status_code == 404


async def test_what_is_open_is_open_to_all_and_even_to_a_bad_token(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/static/style.css", "/sign-in"):
            for headers in ({}, {"Authorization": "Bearer garbage"}):
                assert (await site.client.get(path, headers=headers)).status_code == 200, path


async def test_routes_and_methods_that_do_not_exist_below_the_api_ask_for_a_token_first(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        good = {"Authorization": f"Bearer {token()}"}
        for method, path, status in (("GET", "/api/v1/nope", 404), ("DELETE", "/api/v1/sagas", 405)):
            assert code(await site.client.request(method, path)) == MISSING
            assert (await site.client.request(method, path, headers=good)).status_code == status
        assert (await site.client.get("/nope")).status_code == 404


async def test_a_path_written_another_way_leads_past_no_guard(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for path in (
            "//api/v1/sagas",
            "/api//v1/sagas",
            "/API/v1/sagas",
            "/%61pi/v1/sagas",
            "/api%2Fv1%2Fsagas",
            "/./api/v1/sagas",
            "/static/../api/v1/sagas",
            "/healthz/../api/v1/sagas",
            "/api/v1/sagas/",
            "/api/v1/sagas;x",
        ):
            request = site.client.build_request("GET", "/")
            request.url = request.url.copy_with(raw_path=path.encode())
            answer = await site.client.send(request)
            assert answer.status_code in (401, 404), path


async def test_slashes_at_the_beginning_are_one_and_a_token_counts_there_too(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for path in ("//api/v1/sagas", "///api/v1/sagas", "/%2fapi/v1/sagas"):
            request = site.client.build_request("GET", "/", headers={"Authorization": f"Bearer {token()}"})
            request.url = request.url.copy_with(raw_path=path.encode())
            assert (await site.client.send(request)).status_code == 200, path


async def test_bytes_that_are_no_text_are_an_invalid_token(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        answer = await site.client.get("/api/v1/sagas", headers={b"Authorization": b"Bearer \xff\xfe.\xfd.\xfc"})
        assert (answer.status_code, code(answer)) == (401, INVALID)


async def test_a_stranger_with_a_big_body_is_told_so_and_the_connection_lives(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        for size in (1_000, 3_000_000):
            answer = await site.client.post("/api/v1/sagas", content=b"x" * size)
            assert code(answer) == MISSING
        assert (await site.client.get("/healthz")).status_code == 200


async def test_without_access_control_no_page_of_another_site_changes_anything(site: Site) -> None:
    elsewhere = (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    )
    for headers in elsewhere:
        # As a browser sends what has no type of its own: without asking first whether it may.
        for path, body in (("/api/v1/sagas", b'{"workflow_name": "order"}'), (f"/api/v1/sagas/{NO_SAGA}/cancel", b"")):
            answer = await site.client.post(path, content=body, headers=headers)
            assert (answer.status_code, code(answer)) == (403, DENIED), headers
        assert (await site.client.get("/api/v1/sagas", headers=headers)).json()["pagination"]["total_count"] == 0
    ours: tuple[dict[str, str], ...] = (
        {},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": f"http://127.0.0.1:{site.port}"},
    )
    for headers in ours:
        answer = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=headers)
        assert answer.status_code == 201, headers


async def test_without_access_control_only_names_of_the_loopback_are_answered_to() -> None:
    async with open_site(loopback_names_only=True) as site:
        pages = (
            "/api/v1/sagas",
            "/api/v1/none",
            "/",
            "/audit",
            f"/sagas/{NO_SAGA}",
            "/sign-in",
            "/docs",
            "/static/style.css",
        )
        for host in (
            "evil.example",
            "evil.example:80",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "0.0.0.0",
            "[::]",
        ):
            for path in pages:
                answer = await site.client.get(path, headers={"Host": host})
                assert (answer.status_code, code(answer)) == (403, DENIED), (host, path)
            # To a browser that was led astray the page has the very origin that it asks.
            page = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
            answer = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=page)
            assert (answer.status_code, code(answer)) == (403, DENIED), host
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await site.client.get(path, headers={"Host": host})).status_code == 200
        assert (await site.client.get("/api/v1/sagas")).json()["pagination"]["total_count"] == 0
        port = f":{site.port}"
        for host in (
            "localhost",
            "LOCALHOST" + port,
            "localhost.",
            "saga.localhost" + port,
            "127.0.0.1",
            "127.8.9.1" + port,
            "[::1]",
            "[::1]" + port,
        ):
            answer = await site.client.get("/api/v1/sagas", headers={"Host": host})
            assert answer.status_code == 200, host
        # No browser sends these.
        for head in (
            b"GET /api/v1/sagas HTTP/1.0\r\n\r\n",
            b"GET /api/v1/sagas HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n",
        ):
            assert (await exchange(site.port, head)).startswith(b"HTTP/1.1 200 ")
        over_http2 = H2Client(await trio.open_tcp_stream("127.0.0.1", site.port))
        status, _, _ = await over_http2.answer(await over_http2.request("GET", "/api/v1/sagas"))
        assert status == 403  # its `:authority` is another name
        await over_http2.close()


async def test_with_a_token_it_does_not_matter_which_page_asks(idp: Issuer) -> None:
    headers = {"Authorization": f"Bearer {token_of('sys_operator')}", "Sec-Fetch-Site": "cross-site"}
    async with guarded_site(idp) as site:
        answer = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=headers)
        assert answer.status_code == 201


async def test_the_line_of_a_request_says_who_asked_and_from_where(
    idp: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with guarded_site(idp) as site:
        for bearer in (token_of("sys_auditor", sub="alice"), token_of("nothing", sub="mallory"), "garbage"):
            for path in ("/api/v1/sagas", f"/api/v1/sagas/{NO_SAGA}"):
                await site.client.get(path, headers={"Authorization": f"Bearer {bearer}"})
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("http_request ")]
    # Refused or not, a request is one of its route, in the metrics too.
    assert [line.partition(" route=")[2].split(" ")[0] for line in lines] == [
        "/api/v1/sagas",
        "/api/v1/sagas/{saga_id}",
    ] * 3
    assert [(line.count(" peer=127.0.0.1 "), line.partition(" principal=")[2].split(" ")[0]) for line in lines] == [
        *[(1, "alice")] * 2,
        *[(1, "mallory")] * 2,
        *[(1, "None")] * 2,
    ]


async def test_no_token_that_came_is_ever_told_or_logged(idp: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with guarded_site(idp) as site:
        (listing,) = [operation for operation in operations() if operation.name == "listSagas"]
        for bad in (token(aud="shop"), token("rsa2"), token_of(), token(exp=1), "secret-garbage"):
            answer = await ask(site, listing, f"Bearer {bad}")
            assert answer.status_code in (401, 403)
            told = (
                answer.text
                + str(answer.headers)
                + "".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpcore"))
            )
            assert not any(part in told for part in bad.split("."))
    assert "access_refused" in caplog.text


async def test_with_the_issuer_away_an_unknown_key_is_503_with_a_time_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 0.0)
    with issuer() as idp:
        async with guarded_site(idp) as site:
            idp.status = 500
            answer = await site.client.get("/api/v1/sagas", headers={"Authorization": f"Bearer {token('rsa2')}"})
            assert (answer.status_code, code(answer)) == (503, "SYS_SAGA_UNAVAILABLE")
            assert answer.headers["Retry-After"]
            good = await site.client.get("/api/v1/sagas", headers={"Authorization": f"Bearer {token()}"})
            assert good.status_code == 200


async def test_a_long_poll_answers_when_its_token_expires(idp: Issuer) -> None:
    at = time.time()
    # By a clock that stands still it is good to be let in, however long this machine takes, and then for half a second.
    good = {"Authorization": f"Bearer {token(exp=at - LEEWAY_SECS + 0.5)}"}
    async with verifier(idp, lambda: at) as access, open_site(authenticator=access) as site:
        site.house.answers["Inventory.Reserve"] = [HANGS]
        started = await site.client.post("/api/v1/sagas", json={"workflow_name": "order"}, headers=good)
        with trio.fail_after(30):
            answer = await site.client.get(
                f"/api/v1/sagas/{started.json()['saga_id']}?wait_secs=60", headers=good, timeout=60
            )
        assert answer.status_code == 200
        assert answer.json()["saga"]["status"] in {"STARTED", "RUNNING"}


async def test_the_document_says_what_each_operation_asks(idp: Issuer) -> None:
    async with guarded_site(idp) as site:
        document = (await site.client.get("/openapi.json")).json()
    (scheme,) = document["components"]["securitySchemes"]
    for operation in operations():
        described = document["paths"][operation.path][operation.method.lower()]
        is_open = operation.permission is Permission.OPEN
        assert described["security"] == ([] if is_open else [{scheme: []}])
        assert {"401", "403"}.isdisjoint(described["responses"]) == is_open
