"""Wrong input over HTTP: every error is the one envelope, and the server goes on."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest
import trio

from saga.errors import Unavailable
from tests.web.conftest import Site, open_site
from tests.web.raw import H2_PREFACE, H2Client, exchange, h2_request

CODES = {
    400: "SYS_SAGA_VALIDATION_ERROR",
    404: "SYS_SAGA_NOT_FOUND",
    405: "SYS_SAGA_VALIDATION_ERROR",
    409: "SYS_SAGA_CONFLICT",
    413: "SYS_SAGA_PAYLOAD_TOO_LARGE",
    500: "SYS_SAGA_INTERNAL_ERROR",
    503: "SYS_SAGA_UNAVAILABLE",
}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer that has this status, and the envelope to the letter."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["code", "message", "request_id", "details"]
    assert error["code"] == CODES[status]
    assert error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    for detail in error["details"]:
        assert list(detail)[:3] == ["field", "reason", "message"]
    return error


def fields(error: dict[str, Any]) -> list[str]:
    return [detail["field"] for detail in error["details"]]


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/api/v1",
        "/api/v1/sagas/",
        "/api/v1/sagas/x/y",
        "/api/v2/sagas",
        "/static/../app.py",
        "/%ff",
        "/api//v1/sagas",
    ],
)
async def test_an_unknown_route_is_404_in_the_envelope(site: Site, path: str) -> None:
    error_of(await site.client.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/api/v1/sagas", {"GET", "HEAD", "POST", "OPTIONS"}),
        ("PUT", "/api/v1/sagas/x", {"GET", "HEAD", "OPTIONS"}),
        ("GET", "/api/v1/sagas/x/cancel", {"POST", "OPTIONS"}),
        ("GET", "/api/v1/sagas/x/retry-compensation", {"POST", "OPTIONS"}),
        ("POST", "/healthz", {"GET", "HEAD", "OPTIONS"}),
        ("BREW", "/metrics", {"GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_a_wrong_method_is_405_and_says_which_are_allowed(
    site: Site, method: str, path: str, allowed: set[str]
) -> None:
    answer = await site.client.request(method, path)
    error_of(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == allowed


async def test_options_says_what_is_allowed_and_head_is_get_without_a_body(site: Site) -> None:
    options = await site.client.options("/api/v1/sagas")
    assert (options.status_code, "POST" in options.headers["allow"]) == (200, True)
    for path in ("/healthz", f"/api/v1/sagas/{await site.start()}"):
        head = await site.client.head(path)
        assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"nope", b"[1]", b'"text"', b"null", b"{'workflow_name': 'order'}", b'{"workflow_name": "\xff"}'),
        *(b'{"payload": ' + b"[" * 100_000, b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}"),
    ],
)
async def test_a_body_that_is_no_json_object_is_400(site: Site, body: bytes) -> None:
    for path in ("/api/v1/sagas", "/api/v1/workflows"):
        error_of(await site.client.post(path, content=body, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (
            b'{"workflow_name": "order", "payload": {"a b": [1, {"price": 1e999}], "z": -1e999}}',
            'payload."a b"[1].price',
        ),
        (b'{"a": 1.5, "b": -1e400}', "b"),
        (b'{"a": 15, "b": -1' + b"0" * 5000 + b"}", "b"),
        (b'{"a": ' + b"9" * 4300 + b', "b": -' + b"9" * 4300 + b"}", "b"),
        (b'{"a": 1e999, "b" 1}', ""),
        (b'{"\\ud800": 1e999}', '"?"'),
        (b'{"a": [' + b"1," * 40_000 + b"1e999]}", ""),  # too long to be read again
        (b'{"a": ' + b"[" * 500 + b"1e999" + b"]" * 500 + b"}", "a" + "[0]" * 66 + "\u2026"),
    ],
)
async def test_a_number_that_is_too_large_is_named_by_its_place(site: Site, body: bytes, field: str) -> None:
    answer = await site.client.post("/api/v1/sagas", content=body, headers={"Content-Type": "application/json"})
    (detail,) = error_of(answer, 400)["details"]
    assert (detail["field"], detail["reason"]) == (field, "out_of_range" if field else "malformed")


async def test_every_field_of_a_wrong_type_is_named_with_what_was_expected(site: Site) -> None:
    body = {"workflow_name": 1, "payload": [], "correlation_id": {}, "initiated_by": True, "extra": None, "x": 0}
    error = error_of(await site.client.post("/api/v1/sagas", json=body), 400)
    told = {detail["field"]: (detail["reason"], detail["message"]) for detail in error["details"]}
    unknown = "unknown field; known: workflow_name, payload, correlation_id, initiated_by"
    assert told == {
        "workflow_name": ("type", "expected string, got number"),
        "payload": ("type", "expected object, got array"),
        "correlation_id": ("type", "expected string, got object"),
        "initiated_by": ("type", "expected string, got boolean"),
        "extra": ("unknown", unknown),
        "x": ("unknown", unknown),
    }
    assert "workflow_name: expected string, got number" in error["message"]


async def test_a_missing_field_is_named(site: Site) -> None:
    error = error_of(await site.client.post("/api/v1/sagas", json={}), 400)
    assert [(detail["field"], detail["reason"]) for detail in error["details"]] == [("workflow_name", "required")]
    error = error_of(await site.client.post("/api/v1/workflows", json={"yaml": ""}), 400)
    assert sorted(fields(error)) == ["workflow_yaml", "yaml"]


@pytest.mark.parametrize(
    ("body", "at_fault"),
    [
        ({"workflow_name": ""}, ["workflow_name"]),
        ({"workflow_name": "x" * 256}, ["workflow_name"]),
        ({"workflow_name": "a\u0000"}, ["workflow_name"]),
        (
            {"workflow_name": "order", "correlation_id": "x" * 256, "initiated_by": ""},
            ["correlation_id", "initiated_by"],
        ),
        ({"workflow_name": "order", "payload": None}, ["payload"]),
        ({"workflow_name": "order", "payload": {"a": "\u0000"}}, ["payload"]),
    ],
)
async def test_a_value_that_breaks_a_rule_is_400_by_its_field(
    site: Site, body: dict[str, Any], at_fault: list[str]
) -> None:
    assert fields(error_of(await site.client.post("/api/v1/sagas", json=body), 400)) == at_fault


async def test_a_payload_nested_too_deep_is_400_by_its_field(site: Site) -> None:
    deep = '{"workflow_name": "order", "payload": ' + '{"a":' * 100 + "{}" + "}" * 101
    error = error_of(await site.client.post("/api/v1/sagas", content=deep), 400)
    assert fields(error) == ["payload"]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "json", ""]
)
async def test_a_body_of_another_content_type_is_400(site: Site, content_type: str) -> None:
    answer = await site.client.post(
        "/api/v1/sagas", content=b'{"workflow_name": "order"}', headers={"Content-Type": content_type}
    )
    assert fields(error_of(answer, 400)) == ["Content-Type"]


@pytest.mark.parametrize(
    "content_type", [None, "application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"]
)
async def test_json_by_any_of_its_names_is_taken(site: Site, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await site.client.post("/api/v1/sagas", content=b'{"workflow_name": "order"}', headers=headers)
    assert answer.status_code == 201


@pytest.mark.parametrize(
    ("query", "at_fault"),
    [
        ("page=abc", ["page"]),
        ("page=0", ["page"]),
        ("page=-1", ["page"]),
        ("page=1.5", ["page"]),
        ("page=1e2", ["page"]),
        ("page=99999999999999999999", ["page"]),
        ("page=2147483648&page_size=200", ["page"]),
        ("page=", ["page"]),
        ("page_size=0", ["page_size"]),
        ("page_size=201", ["page_size"]),
        ("page=x&page_size=y&status=z", ["page", "page_size", "status"]),
        ("page=1&page=2", ["page"]),
        ("status=running", ["status"]),
        ("status=", ["status"]),
        ("status=null", ["status"]),
        ("created_after=2026-01-02", ["created_after"]),
        ("created_after=2026-01-02T03:04:05", ["created_after"]),
        ("created_after=yesterday", ["created_after"]),
        ("created_after=0001-01-01T00:00:00%2B14:00", ["created_after"]),
        ("created_before=1735689600", ["created_before"]),
        ("compensation_failed=1", ["compensation_failed"]),
        ("compensation_failed=True", ["compensation_failed"]),
        ("cursor=nope", ["cursor"]),
        ("workflow_name=", ["workflow_name"]),
        ("workflow_name=%00", ["workflow_name"]),
        ("correlation_id=" + "x" * 256, ["correlation_id"]),
        ("nope=1", ["nope"]),
        ("workflow_name=%ff", [""]),
        ("&".join(f"a{n}=1" for n in range(101)), [""]),
    ],
)
async def test_a_bad_query_value_is_400_by_its_parameter(site: Site, query: str, at_fault: list[str]) -> None:
    assert fields(error_of(await site.client.get(f"/api/v1/sagas?{query}"), 400)) == at_fault


async def test_a_bad_status_is_told_which_there_are(site: Site) -> None:
    error = error_of(await site.client.get("/api/v1/sagas?status=DONE"), 400)
    for status in ("STARTED", "RUNNING", "COMPLETED", "COMPENSATING", "FAILED", "CANCELLED"):
        assert status in error["details"][0]["message"]


@pytest.mark.parametrize("value", ["abc", "-1", "60.1", "nan", "inf", "", "true", "1e9"])
async def test_a_bad_wait_is_400_by_its_parameter(site: Site, value: str) -> None:
    saga_id = await site.start()
    assert fields(error_of(await site.client.get(f"/api/v1/sagas/{saga_id}?wait_secs={value}"), 400)) == ["wait_secs"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/v1/sagas?x=1"),
        ("GET", "/api/v1/sagas/{id}?x=1"),
        ("POST", "/api/v1/sagas/{id}/cancel?x=1"),
        ("POST", "/api/v1/sagas/{id}/retry-compensation?x=1"),
        ("POST", "/api/v1/workflows?x=1"),
        ("GET", "/api/v1/workflows?x=1"),
        ("GET", "/api/v1/workflows/order?x=1"),
    ],
)
async def test_an_unknown_query_parameter_is_400_by_its_name(site: Site, method: str, path: str) -> None:
    saga_id = await site.start()
    answer = await site.client.request(
        method, path.replace("{id}", saga_id), json={"workflow_name": "order"} if method == "POST" else None
    )
    assert fields(error_of(answer, 400)) == ["x"]


async def test_an_idempotency_key_given_twice_is_400(site: Site) -> None:
    answer = await site.client.post(
        "/api/v1/sagas",
        json={"workflow_name": "order"},
        headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")],
    )
    assert fields(error_of(answer, 400)) == ["Idempotency-Key"]


BIG = 3 * 1024 * 1024


async def test_a_body_over_the_limit_is_413_and_the_connection_goes_on(site: Site) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(BIG // 65536):
            yield b"x" * 65536

    error_of(await site.client.post("/api/v1/sagas", content=b"x" * BIG), 413)
    error_of(await site.client.post("/api/v1/sagas", content=chunks()), 413)
    error_of(await site.client.post("/api/v1/workflows", content=b"x" * BIG), 413)
    error_of(await site.client.get("/nope"), 404)


async def test_an_endless_body_is_413_and_closes_the_connection(site: Site) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", site.port)
    received = b""

    async def flood() -> None:
        head = b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        try:
            await stream.send_all(head)
            while True:
                await stream.send_all(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        with trio.fail_after(10):
            while b'"details"' not in received:
                received += await stream.receive_some()
        nursery.cancel_scope.cancel()
    assert received.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in received.lower()
    await site.start()


async def test_a_body_over_the_limit_is_413_over_http2_and_other_streams_go_on(site: Site) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", site.port)
    async with stream:
        client = H2Client(stream)
        big = await client.request("POST", "/api/v1/sagas", b"x" * BIG)
        status, headers, body = await client.answer(big)
        assert (status, json.loads(body)["error"]["code"]) == (413, "SYS_SAGA_PAYLOAD_TOO_LARGE")
        assert "connection" not in headers
        status, _, _ = await client.answer(await client.request("GET", "/healthz"))
        assert status == 200


async def test_an_unexpected_error_is_500_without_a_traceback_and_logged_with_the_request_id(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret of the inside")

    monkeypatch.setattr(site.house.store, "get", broken)
    monkeypatch.setattr(site.house.store, "list_sagas", broken)
    with caplog.at_level(logging.ERROR):
        for path in ("/api/v1/sagas/00000000-0000-4000-8000-000000000000", "/api/v1/sagas"):
            caplog.clear()
            answer = await site.client.get(path, headers={"X-Request-Id": "r-500"})
            error = error_of(answer, 500)
            assert (error["message"], error["details"], error["request_id"]) == ("internal error", [], "r-500")
            assert "secret" not in answer.text
            assert "r-500" in caplog.text
            assert "secret of the inside" in caplog.text


async def test_an_unexpected_error_at_the_door_itself_is_answered_and_told_as_any_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("web.door.check_header_count", lambda _: 1 // 0)
    answer = await site.client.get("/api/v1/sagas", headers={"X-Request-Id": "r-500"})
    assert error_of(answer, 500)["request_id"] == "r-500"
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if line.startswith("http_error ")] == ["http_error request_id=r-500"]
    assert sum("status=500" in line for line in lines if line.startswith("http_request ")) == 1


async def test_an_absent_store_is_503_with_retry_after(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*args: object, **kwargs: object) -> None:
        raise Unavailable("the database cannot be reached", "10.1.2.3:5432 refused")

    for name in ("get", "list_sagas", "create", "workflows"):
        monkeypatch.setattr(site.house.store, name, away)
    for method, path in (
        ("GET", "/api/v1/sagas"),
        ("GET", "/api/v1/sagas/00000000-0000-4000-8000-000000000000"),
        ("POST", "/api/v1/sagas"),
        ("GET", "/api/v1/workflows"),
    ):
        answer = await site.client.request(method, path, json={"workflow_name": "order"} if method == "POST" else None)
        # Where our database is, is nothing to tell to clients.
        assert error_of(answer, 503)["message"] == "the database cannot be reached"
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [("r-1", True), ("a b!~", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("caf\xe9", False)],
)
async def test_x_request_id_is_echoed_in_header_and_envelope_if_it_is_printable_ascii_of_at_most_128(
    site: Site, sent: str, echoed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "saga.web"):
        for path, status in (("/nope", 404), ("/api/v1/sagas/x", 404), ("/api/v1/sagas?page=0", 400)):
            caplog.clear()
            answer = await site.client.get(path, headers=[(b"X-Request-Id", sent.encode("latin-1"))])
            known_as = error_of(answer, status)["request_id"]
            assert (known_as == sent) is echoed
            assert echoed or len(known_as) == 36
            assert f"request_id={known_as}" in caplog.text


async def test_x_request_id_is_in_the_header_of_every_answer(site: Site) -> None:
    for path in (
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/",
        "/api/v1/workflows",
        f"/api/v1/sagas/{await site.start()}",
    ):
        answer = await site.client.get(path, headers={"X-Request-Id": "r-9"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "r-9"), path


PATH = [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/healthz")]
WS = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
EARLY = h2_request([(":method", "POST"), *PATH[1:]], end=False)

POST = b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(b'{"workflow_name": "order", "payload": {"a": "' + b"x" * 10_000_000 + b'"}}')

HOSTILE: dict[str, Sequence[bytes]] = {
    "a folded header": [b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\tc\r\n\r\n"],
    "a folded header of no end": [b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: a" + b"\r\n b" * 30_000],
    "a blank before the colon": [b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n"],
    "two hosts": [b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"],
    "a null in a header": [b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n"],
    "empty lines first": [b"\r\n" * 50_000],
    "a target of 100 kB": [b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"],
    "a method of 100 kB": [b"G" * 100_000 + b" / HTTP/1.1\r\nHost: a\r\n\r\n"],
    "HTTP/0.9": [b"GET /\r\n\r\n"],
    "HTTP/9.9": [b"GET / HTTP/9.9\r\nHost: a\r\n\r\n"],
    "trace": [b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n"],
    "an absolute target with a user": [b"GET http://u:p@a/../../etc HTTP/1.1\r\nHost: a\r\n\r\n"],
    "a target of two slashes": [b"GET //a/b HTTP/1.1\r\nHost: a\r\n\r\n"],
    "a length of thirty digits": [POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nab"],
    "a length with a sign": [POST + b"Content-Length: +2\r\n\r\nab"],
    "chunks of chunks": [POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"],
    "chunks in HTTP/1.0": [b"POST /api/v1/sagas HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
    "a chunk of 2^64": [CHUNKED + b"10000000000000000\r\nx"],
    "an endless chunk extension": [CHUNKED + b"1;" + b"e" * 200_000],
    "chunks of a byte with extensions": [CHUNKED + b"1;a=b\r\nx\r\n" * 5000],
    "endless trailers": [CHUNKED + b"0\r\n" + b"X: y\r\n" * 20_000],
    "a body that is expected and never sent": [POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"],
    "an expectation nobody has": [POST + b"Content-Length: 0\r\nExpect: the-moon\r\n\r\n"],
    "a compressed body that inflates": [
        POST + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB
    ],
    "hundreds in one go": [b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 300],
    "h2c upgrade, then noise": [
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        H2_PREFACE + b"\xff" * 200,
    ],
    "h2 websocket": [h2_request([(":method", "CONNECT"), (":protocol", "websocket"), *PATH[1:]], end=False)],
    "noise": [b"\xff\xfe\x00" * 50],
    "bad header name": [b"GET /healthz HTTP/1.1\r\nHost: a\r\n\xff\xff: x\r\n\r\n"],
    "path is no ASCII": [b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n"],
    "query is no ASCII": [b"GET /healthz?\xff HTTP/1.1\r\nHost: a\r\n\r\n"],
    "no host": [b"GET /healthz HTTP/1.1\r\n\r\n"],
    "absolute target": [b"GET http://a:99999/ HTTP/1.1\r\nHost: a\r\n\r\n"],
    "bracketed target": [b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n"],
    "target without slash": [b"GET nope HTTP/1.1\r\nHost: a\r\n\r\n"],
    "options *": [b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"],
    "connect": [b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"],
    "unknown transfer encoding": [b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"],
    "bad chunk": [b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n"],
    "negative length": [b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n"],
    "two lengths": [b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"],
    "length and chunks": [
        b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ],
    "bad host": [b"GET /healthz HTTP/1.1\r\nHost: a b/c\r\n\r\n"],
    "huge header": [b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"],
    "pipelined": [b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 5 + b"x"],
    "h2c upgrade, bad settings": [
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: !!!!\r\n\r\n"
    ],
    "h2c upgrade, no settings": [b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"],
    "websocket without key": [b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"],
    "websocket version": [WS.replace(b"13", b"99") + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"],
    "websocket, then noise": [WS + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", b"\xff\xff\xff\xff"],
    "h2 noise": [H2_PREFACE + b"\xff" * 100],
    "h2 unknown frame": [H2_PREFACE + b"\x00\x00\x04\x42\x00\x00\x00\x00\x00abcd"],
    "h2 without path": [h2_request(PATH[:3])],
    "h2 without method": [h2_request(PATH[1:])],
    "h2 path is no ASCII": [h2_request([*PATH[:3], (":path", "/\u00ff")])],
    "h2 query is no ASCII": [h2_request([*PATH[:3], (":path", "/api/v1/sagas?page=\u00ff")])],
    "h2 header is no ASCII": [h2_request([*PATH, ("x-request-id", "\u00ff")])],
    "h2 connect": [h2_request([(":method", "CONNECT"), (":authority", "a")])],
    "h2 data on idle": [H2_PREFACE + b"\x00\x00\x03\x00\x00\x00\x00\x00\x05abc"],
    "h2 data after the answer": [
        h2_request(PATH, end=True),
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x01\x00\x00\x01\x00" + b"\x00\x00\x03\x00\x00\x00\x00\x00\x01abc",
    ],
    "h2 priority": [H2_PREFACE + b"\x00\x00\x05\x02\x00\x00\x00\x00\x03\x00\x00\x00\x00\x10"],
    "h2 body cut off": [EARLY + b"\x00\x00\x03\x00\x00\x00\x00\x00\x01abc"],
    "h2 reset in the body": [EARLY + b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x08"],
}


@pytest.mark.parametrize("parts", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_bytes_leave_the_server_alive(site: Site, parts: Sequence[bytes]) -> None:
    with trio.fail_after(5):
        await exchange(site.port, *parts, wait_secs=0.2)
        assert (await site.client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://elsewhere:80/api/v1/workflows", b"200"),
        (b"http://elsewhere", b"200"),
        (b"http://elsewhere/api/v1/nope", b"404"),
        (b"http://[", b"400"),
        (b"nope", b"404"),
    ],
)
async def test_a_url_as_the_target_is_answered_by_its_path(site: Site, target: bytes, status: bytes) -> None:
    answer = await exchange(site.port, b"GET " + target + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    ("head", "field"),
    [
        (b"Host: a\r\nContent-Length: 30\r\nTransfer-Encoding: chunked", "Content-Length"),
        (b"Host: a b/c\r\nContent-Length: 5", "Host"),
        (b"Host: a@b\r\nContent-Length: 5", "Host"),
    ],
)
async def test_a_request_that_is_another_to_somebody_in_front_is_400_and_what_follows_it_is_not_looked_at(
    site: Site, head: bytes, field: str
) -> None:
    hidden = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = await exchange(site.port, b"POST /api/v1/sagas HTTP/1.1\r\n" + head + b"\r\n\r\n0\r\n\r\n" + hidden)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in answer.lower()
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert [detail["field"] for detail in error["details"]] == [field]


@pytest.mark.parametrize("host", ["a", "a.example:8080", "[::1]:8080", "127.0.0.1", "", "x_y-z"])
async def test_hosts_that_there_are_are_taken(site: Site, host: str) -> None:
    answer = await exchange(site.port, f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("method", ["head", "Head", "get"])
async def test_a_method_not_in_capitals_is_501_and_no_error_of_ours(
    site: Site, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await exchange(site.port, f"{method} /nope HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"connection: close" in answer.lower()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_websocket_is_turned_away(site: Site) -> None:
    answer = await exchange(site.port, WS + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403")


async def test_data_on_a_stream_that_was_answered_early_ends_one_connection_at_most(site: Site) -> None:
    stream = await trio.open_tcp_stream("127.0.0.1", site.port)
    async with stream:
        client = H2Client(stream)
        # 404 comes before the body does only if nobody waits for it; ours does, so the flood ends the wait for it.
        connection = client.connection
        connection.send_headers(1, [(":method", "POST"), *PATH[1:3], (":path", "/nope")])
        for _ in range(3):
            connection.send_data(1, b"x" * 16384)
        await client.send()
        connection.send_data(1, b"", end_stream=True)
        await client.send()
        status, _, _ = await client.answer(1)
        assert status == 404
    assert (await site.client.get("/healthz")).status_code == 200


async def test_a_client_that_never_finishes_its_body_is_told_400(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.body.BODY_SECS", 0.1)
    async with open_site() as site:
        answer = await exchange(
            site.port, b"POST /api/v1/sagas HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc", wait_secs=3
        )
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"did not arrive" in answer
        assert b"connection: close" in answer.lower()
