"""Log lines: what is an event and what a field, what no text can forge, what is never in one, and who is not waited
for."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saga import log_fields
from saga.payload_mask import PayloadMask
from server.config import Secret
from server.config_loading import load_config
from server.logs import JsonLines, LineHandler, TextLines, template_of
from server.redaction import Mask, secrets_of
from tests.support.participants import participant
from tests.support.server_process import ROOT, free_port, server_process

LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) +\S+ [a-z]|    ")
"""How every line of the text form begins; indented: a traceback's."""


def record(message: str, *args: object, name: str = "saga.test", error: BaseException | None = None) -> Any:
    told = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(name, logging.WARNING, "", 0, message, args, told)


def as_json(told: logging.LogRecord, *secrets: str, worker: int | None = None) -> dict[str, Any]:
    line = JsonLines(Mask(map(Secret, secrets)), worker).format(told)
    assert line.isascii()
    assert line.isprintable()
    found: dict[str, Any] = json.loads(line)
    return found


def as_text(told: logging.LogRecord, *secrets: str, worker: int | None = None) -> str:
    return TextLines(Mask(map(Secret, secrets)), worker).format(told)


# --- events and fields -----------------------------------------------------------------------------------------------


def log_calls() -> Iterator[tuple[str, str]]:
    """Where each log call of the product is, and its template."""
    for folder in ("saga", "store", "rpc", "web", "server", "bridge"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr in LEVELS and ast.unparse(node.func.value) in {"log", "_log"}:
                    template = node.args[node.func.attr == "log"]
                    assert isinstance(template, ast.Constant), f"{file.name}:{node.lineno}: no constant"
                    assert isinstance(template.value, str)
                    yield f"{file.name}:{node.lineno}", template.value


def test_every_log_call_of_ours_names_an_event_and_its_fields() -> None:
    calls = list(log_calls())
    assert len(calls) > 40
    assert [where for where, template in calls if template_of(template) is None] == []


def test_a_line_about_a_connection_says_whose_it_is() -> None:
    about_one = re.compile(r"(http|grpc)_(connection_\w+|client_\w+|head_\w+|answer_not_\w+)|tls_handshake_\w+")
    told = {template for _, template in log_calls() if about_one.fullmatch(template.partition(" ")[0])}
    assert len(told) > 8
    assert [template for template in told if " peer=%s" not in template] == []


def test_the_events_the_document_tells_people_to_look_for_are_logged() -> None:
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    table = text[text.index("| event | level |") :].partition("\n\n")[0]
    documented = {event for row in table.splitlines()[2:] for event in re.findall(r"`(\w+)`", row.split("|")[1])}
    logged = {template.partition(" ")[0] for _, template in log_calls()}
    assert len(documented) > 15
    assert documented - logged == set()


def test_a_line_has_the_event_the_fields_and_whom_it_is_about() -> None:
    told = record("step_done saga_id=%s attempt=%d ms=%.1f at=http://%s:%d error=%r", "s-1", 2, 3.14159, "h", 80, "é x")
    with log_fields.about(request_id="r-1", saga_id="another"):
        line = as_json(told, worker=3)
        text = as_text(told, worker=3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "warning",
        "event": "step_done",
        "logger": "saga.test",
        "worker": 3,
        "saga_id": "s-1",
        "attempt": 2,
        "ms": 3.1,
        "at": "http://h:80",
        "error": "é x",
        "request_id": "r-1",
    }
    fields = 'saga_id=s-1 attempt=2 ms=3.1 at=http://h:80 error="é x" request_id=r-1'
    assert text.partition(" ")[2] == f"WARNING worker-3 saga.test step_done {fields}"


def test_what_a_library_logs_is_one_event_with_its_text() -> None:
    told = record("Task %s\nfailed", "x", name="asyncio")
    line = as_json(told)
    assert (line["event"], line["message"], line["logger"]) == ("log_message", "Task x\nfailed", "asyncio")
    assert as_text(told).endswith('asyncio log_message message="Task x\\nfailed"')
    # A text of its own that looks like an event of ours is none.
    assert as_json(record("shut", name="hypercorn"))["event"] == "log_message"


def test_a_call_whose_arguments_do_not_fit_still_says_what_it_was() -> None:
    assert as_json(record("saga_ended saga_id=%s status=%s", "s-1"))["message"] == "saga_ended saga_id=%s status=%s"


# --- forging ---------------------------------------------------------------------------------------------------------

FORGED = (
    "no\n2026-01-01T00:00:00.000Z ERROR   saga.runner saga_crashed saga_id=x\r\x1b[2J\x9b1m\x7f\u2028\u202e\x00\ud800"
)


@pytest.mark.parametrize("where", ["value", "context", "traceback", "library"])
def test_no_text_makes_a_line_or_a_field_or_moves_the_cursor(where: str) -> None:
    error = ValueError(FORGED) if where == "traceback" else None
    if where == "value":
        told = record("attempt_failed message=%s", FORGED)
    else:
        name, message = ("h2", FORGED) if where == "library" else ("saga.test", "fine")
        told = record(message, name=name, error=error)
    with log_fields.about(correlation_id=FORGED if where == "context" else "c"):
        line, text = as_json(told), as_text(told)
    assert line["level"] == "warning"
    lines = text.split("\n")
    assert all(LINE.match(each) for each in lines), text
    assert [each for each in lines[1:] if not each.startswith("    ")] == []
    assert all(character.isprintable() for each in lines for character in each)


def test_a_text_without_end_is_cut() -> None:
    told = record("attempt_failed message=%s", "x" * 1_000_000, error=ValueError("y" * 1_000_000))
    assert len(as_text(told)) < 50_000
    assert len(json.dumps(as_json(told))) < 50_000


# --- secrets ---------------------------------------------------------------------------------------------------------

TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "text",
    [
        'hunter-2 "x"',
        "of postgresql://saga:hunter-2%20%22x%22@db:5432/saga",
        "of postgresql://saga:other-w0rd@db:5432/saga",
        json.dumps({"said": 'hunter-2 "x"'}),
        "password=other-w0rd host=db",
        "{'password': 'other-w0rd'}",
        f"Authorization: Bearer {TOKEN}",
        f"GET /x?token={TOKEN}",
        "authorization=other-w0rd",
        "(b'authorization', b'Basic other-w0rd==')",
        "bearer other-w0rd",
        *(
            f"'GET /\\n{secret}'"
            for secret in (TOKEN, "Bearer other-w0rd", "password=other-w0rd", "authorization=other-w0rd")
        ),
        *(f"{before}{TOKEN}" for before in ("-", "_", "%3D", "token_")),
        *("db_password=other-w0rd", "PGPASSWORD=other-w0rd", '{"password":"a b other-w0rd"}'),
        "Authorization: ApiKey other-w0rd-of-a-client",
        "x" * 5000 + 'hunter-2 "x"' + "x" * 5000,
    ],
)
def test_a_secret_is_in_no_line_wherever_it_came_from(text: str) -> None:
    hidden = 'hunter-2 "x"'
    told = record("trouble error=%s", text, error=RuntimeError(text))
    for shown in (as_text(told, hidden), json.dumps(as_json(told, hidden))):
        assert not re.search(r"hunter|other-w0rd|eyJhb|c2lnb", shown), shown
        assert "***" in shown or len(text) > 5000


def test_what_is_no_secret_stays_as_it_is() -> None:
    for text in ("no password given", "http://host:80/path", "the basic idea", "bearer of news"):
        assert Mask([Secret("short")])(f"short: {text}") == f"short: {text}"


@pytest.mark.parametrize(
    "then",
    [
        *(
            "a.",
            "a://",
            "://:",
            "a://x:",
            "eyJ-",
            "eyJ",
            "aeyJ",
            "eyJaaaaa.",
            "bearer ",
            "\\nbearer ",
            "password=",
            " ",
        ),
        *('password="', "authorization:a ", "authorization"),
    ],
)
def test_a_text_made_to_be_slow_to_mask_is_not(then: str) -> None:
    text = "password authorization:" + then * (200_000 // len(then))
    began = time.process_time()
    Mask()(text)
    assert time.process_time() - began < 20  # a cost that grows with its square would be minutes


def test_fields_of_payloads_are_hidden_in_what_a_participant_says() -> None:
    mask = Mask(fields=PayloadMask(["card", "customer.name"]))
    told = record("step_failed error=%s", 'no: {"card": "4111 1111"}, name=Zoe', error=RuntimeError("card=4111"))
    for shown in (JsonLines(mask, None).format(told), TextLines(mask, None).format(told)):
        assert not re.search("1111|4111|Zoe", shown), shown


def test_every_secret_of_the_configuration_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20collector-token,x=plain-token")
    kafka = {
        "brokers": ["b:1"],
        "security_protocol": "SASL_PLAINTEXT",
        "sasl": {"username": "u", "password": "broker-1"},
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"database": {"name": "d", "user": "u", "password": "store-1"}, "kafka": kafka}))
    found = {secret.reveal() for secret in secrets_of(load_config(file, {}))}
    assert {"store-1", "broker-1", "collector-token", "plain-token"} <= found


# --- whoever reads ---------------------------------------------------------------------------------------------------


def test_a_reader_that_does_not_read_is_not_waited_for_and_learns_what_it_missed() -> None:
    reading, writing = os.pipe()
    handler = LineHandler(writing)
    handler.setFormatter(JsonLines(Mask(), None))
    try:
        for number in range(20_000):  # far more than a pipe and what is kept beside it hold
            handler.emit(record("tick number=%d", number))
        assert handler.lost > 0
        seen = b""
        while handler._waiting:
            seen += os.read(reading, 65536)
            handler.drain(0.0)
        handler.emit(record("tock"))
        os.close(writing)
        writing = -1
        while chunk := os.read(reading, 65536):
            seen += chunk
    finally:
        os.close(reading)
        if writing != -1:
            os.close(writing)
    lines = [json.loads(line) for line in seen.splitlines()]
    ticks = [line["number"] for line in lines if line["event"] == "tick"]
    assert ticks == list(range(len(ticks)))
    assert [line["event"] for line in lines[-2:]] == ["log_lines_lost", "tock"]
    assert lines[-2]["count"] == handler.lost_in_all == 20_000 - len(ticks)
    assert handler.lost == 0


def test_a_reader_that_is_gone_harms_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    handler = LineHandler(writing)
    handler.setFormatter(JsonLines(Mask(), None))
    handler.emit(record("tick"))
    os.close(writing)
    assert handler.lost == 0


def test_an_error_nobody_caught_is_a_line_too() -> None:
    code = (
        "from server import logs; from server.config import LogConfig, LogFormat\n"
        "logs.configure(LogConfig(format=LogFormat.JSON))\n"
        "import threading; told = threading.Thread(target=lambda: 1 / 0); told.start(); told.join()\n"
        "import warnings; warnings.warn('old\\nways', UserWarning)\n"
        "raise ValueError('no\\nway')\n"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=env)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["thread_crashed", "log_message", "crashed"]
    assert "ZeroDivisionError" in lines[0]["traceback"]
    assert "ValueError: no\nway" in lines[2]["traceback"]
    assert done.returncode == 1


# --- a server --------------------------------------------------------------------------------------------------------

BROKEN = """
import sys
from saga.service import SagaService
from server.cli import main

async def broken(*_, **__):
    raise RuntimeError("the inside of it: password=s3cret-in-code")

SagaService.list_sagas = broken
sys.exit(main())
"""
WORKFLOW = """\
name: order
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
  - {name: ship, service: shop, method: Shipping.Ship}
"""


def test_a_server_in_trouble_all_around_runs_sagas_and_logs_whole_lines_without_secrets(tmp_path: Path) -> None:
    said = f'no\n{{"event": "forged"}}\nBearer {TOKEN} postgres://u:other-w0rd@db/x'
    config = {
        "services": {},
        "kafka": {
            "brokers": [f"127.0.0.1:{free_port()}"],
            "security_protocol": "SASL_PLAINTEXT",
            "sasl": {"username": "u", "password": "br0ker-word"},
        },
        "observability": {
            "log": {"level": "debug"},
            "otlp": {"endpoint": f"http://u:c0llector-word@127.0.0.1:{free_port()}"},
        },
    }
    env = {
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20c0llector-token",
        "SAGA__OBSERVABILITY__LOG__FORMAT": "json",
    }
    with participant(flavour="grpcio", script={"Ship": [{"status": "FAILED_PRECONDITION", "message": said}]}) as shop:
        config["services"] = {"shop": shop.settings()}
        with server_process(tmp_path, config, env=env, program=("-c", BROKEN)) as server:
            server.start()
            server.register(WORKFLOW)
            body = {"workflow_name": "order", "correlation_id": "c"}
            headers = {"Authorization": f"Bearer {TOKEN}", "X_Request_Id": "r-start"}
            status, answer = server.call("POST", "/api/v1/sagas", body, **headers)
            assert status == 201
            saga_id = answer["saga_id"]
            assert server.ended(saga_id)["saga"]["status"] == "FAILED"
            status, answer = server.call("GET", "/api/v1/sagas", X_Request_Id="r-500", Authorization="Basic other-w0rd")
            assert status == 500
            assert answer["error"]["request_id"] == "r-500"
            assert "inside" not in json.dumps(answer)
            assert server.call("GET", f"/api/v1/{TOKEN}", Authorization=TOKEN)[0] == 404
            give_up_at = time.monotonic() + 60
            while "relay_stalled" not in server.log:
                assert time.monotonic() < give_up_at
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as figures:
                assert "saga_spans_exported_total 0" in figures.read().decode()
            server.process.terminate()
            assert server.wait() == 0
            log = server.log
    lines = [json.loads(line) for line in log.splitlines()]
    assert not re.search(r"s3cret|br0ker-word|c0llector|other-w0rd|eyJhb|c2lnb", log)
    assert {"ready", "attempt_failed", "saga_ended", "http_request", "http_error", "spans_lost", "stopped"} <= {
        line["event"] for line in lines
    }
    assert all(set(line) >= {"time", "level", "event", "logger"} for line in lines)
    assert "forged" not in {line["event"] for line in lines}
    named = {line["event"]: line for line in lines if line.get("saga_id") == saga_id}
    about = {"saga_id": saga_id, "correlation_id": "c", "trace_id": saga_id.replace("-", "")}
    assert about.items() <= named["attempt_failed"].items()
    (started,) = [line for line in lines if line["event"] == "http_request" and line["request_id"] == "r-start"]
    assert (about | {"route": "/api/v1/sagas", "method": "POST", "status": 201}).items() <= started.items()
    (crash,) = [line for line in lines if line["event"] == "http_error"]
    assert crash["request_id"] == "r-500"
    assert "RuntimeError: the inside of it: password=***" in crash["traceback"]
