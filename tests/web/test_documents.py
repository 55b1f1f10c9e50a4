"""Health, readiness, metrics, and the pages."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import trio

from saga.authentication import OpenAccess
from saga.errors import Unavailable
from saga.model import SagaStatus, StepAction, StepStatus
from saga.ports import UndoDebt
from saga.readiness import Readiness
from tests.support.orchestrator import HANGS, REFUSED, orchestrator
from tests.web.conftest import Site
from web.app import create_app
from web.metrics import MAX_NAMES, PrometheusMeter

WELL = dict.fromkeys(("database", "migrations", "lease", "worker", "workflows"), "ok")
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def test_healthz_answers_while_the_process_lives(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away() -> None:
        raise Unavailable("database cannot be reached")

    monkeypatch.setattr(site.house.store, "ping", away)
    answer = await site.client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readyz_is_healthy_with_its_checks_and_a_timestamp(site: Site) -> None:
    answer = await site.client.get("/readyz")
    body = answer.json()
    assert INSTANT.fullmatch(body.pop("timestamp"))
    assert (answer.status_code, body) == (200, {"status": "healthy", "checks": WELL})


async def test_readyz_is_503_unhealthy_without_the_database_and_tells_nothing_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> None:
        raise Unavailable("no route to 10.1.2.3 as user saga")

    monkeypatch.setattr(site.house.store, "ping", away)
    answer = await site.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
    assert answer.json()["checks"] == WELL | {"database": "unavailable"}
    monkeypatch.setattr("saga.readiness.CHECK_SECS", 0.05)
    monkeypatch.setattr(site.house.store, "ping", trio.sleep_forever)
    assert (await site.client.get("/readyz")).json()["checks"]["database"] == "timeout"


async def test_readyz_is_503_while_the_worker_drains(site: Site) -> None:
    site.house.supervisor.is_draining = True
    answer = await site.client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["worker"]) == (503, "draining")


async def test_readyz_is_degraded_when_an_optional_part_fails() -> None:
    async def kafka() -> None:
        raise Unavailable("no broker")

    async with orchestrator() as house, trio.open_nursery() as nursery:
        app = create_app(
            house.service,
            authenticator=OpenAccess(),
            drain=house.drain,
            version="1",
            readiness=Readiness(house.service, house.drain, {"kafka": kafka}),
        )
        answer = await app.test_client().get("/readyz")
        body = await answer.get_json()
        assert (answer.status_code, body["status"]) == (200, "degraded")
        assert body["checks"] == WELL | {"kafka": "unavailable"}
        nursery.cancel_scope.cancel()


async def test_metrics_count_what_happened(site: Site) -> None:
    await site.ended(await site.start())
    site.house.answers["Payment.Charge"] = [REFUSED]
    site.house.answers["Inventory.Release"] = [REFUSED]
    failed = await site.start()
    await site.ended(failed)
    await site.client.get("/api/v1/sagas/nope")
    await site.client.get("/nope/nope")
    site.house.answers["Inventory.Reserve"] = [HANGS]
    await site.start()
    site.meter.read_gauge("saga_active", "Sagas in memory", lambda: site.house.supervisor.active)
    site.meter.read_counter("saga_outbox_published", "Events", lambda: {"one": 7.0}, "part")
    answer = await site.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        'saga_started_total{workflow="order"} 3.0',
        'saga_finished_total{status="COMPLETED",workflow="order"} 1.0',
        'saga_finished_total{status="FAILED",workflow="order"} 1.0',
        'saga_duration_seconds_count{status="COMPLETED",workflow="order"} 1.0',
        'saga_attempts_total{action="EXECUTE",code="OK"} 3.0',
        'saga_attempts_total{action="EXECUTE",code="FAILED_PRECONDITION"} 1.0',
        'saga_attempts_total{action="COMPENSATE",code="FAILED_PRECONDITION"} 1.0',
        'saga_attempt_duration_seconds_count{action="EXECUTE"} 4.0',
        'saga_participant_calls_total{code="OK",method="Inventory.Reserve",service="inventory"} 2.0',
        'saga_participant_calls_total{code="FAILED_PRECONDITION",method="Inventory.Release",service="inventory"} 1.0',
        'saga_participant_call_duration_seconds_count{method="Payment.Charge",service="payment"} 2.0',
        'saga_steps_total{action="EXECUTE",status="SUCCESS",workflow="order"} 3.0',
        'saga_steps_total{action="EXECUTE",status="FAILED",workflow="order"} 1.0',
        'saga_steps_total{action="COMPENSATE",status="FAILED",workflow="order"} 1.0',
        'saga_undo_debt{state="failed",workflow="order"} 1.0',
        'saga_undo_debt{state="pending",workflow="order"} 0.0',
        'saga_undo_debt_oldest_seconds{workflow="order"} ',
        'saga_compensation_failures_total{workflow="order"} 1.0',
        "saga_leases_lost_total 0.0",
        "saga_crashes_total 0.0",
        "saga_active 1.0",
        'saga_open{status="RUNNING"} 1.0',
        'saga_open{status="STARTED"} 0.0',
        'saga_outbox_published_total{part="one"} 7.0',
        'saga_http_requests_total{method="POST",route="/api/v1/sagas",status="201"} 3.0',
        'saga_http_requests_total{method="GET",route="/api/v1/sagas/{saga_id}",status="404"} 1.0',
        'saga_http_requests_total{method="GET",route="none",status="404"} 1.0',
        'saga_http_request_duration_seconds_count{method="POST",route="/api/v1/sagas"} 3.0',
    ):
        assert line in answer.text


async def test_metrics_are_served_without_the_database(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away() -> None:
        raise Unavailable("database cannot be reached")

    monkeypatch.setattr(site.house.store, "count_open", away)
    assert "saga_http_requests_total" in (await site.client.get("/metrics")).text


def test_labels_are_bounded_under_ten_thousand_names_of_each_kind() -> None:
    meter = PrometheusMeter()
    for number in range(10_000):
        name = f"w{number}"
        meter.saga_started(name)
        meter.saga_ended(name, SagaStatus.FAILED, 1.0)
        meter.step_ended(name, StepAction.EXECUTE, StepStatus.FAILED)
        meter.compensation_failed(name)
        meter.attempt_made(StepAction.EXECUTE, "shop", f"Shop.{name}", f"made up {number}", 0.1)
        meter.http_request_served(f"BREW{number}", "none", 405, 0.1)
    debts = [UndoDebt(workflow_name=f"w{n}", failed=1, pending=2, oldest_secs=float(n)) for n in range(10_000)]
    meter.set_store_counts({}, debts)
    text = meter.render().decode()
    others = 10_000 - MAX_NAMES
    for name, labels, value in (
        ("saga_started_total", 'workflow="other"', others),
        ("saga_finished_total", 'status="FAILED",workflow="other"', others),
        ("saga_duration_seconds_count", 'status="FAILED",workflow="other"', others),
        ("saga_steps_total", 'action="EXECUTE",status="FAILED",workflow="other"', others),
        ("saga_compensation_failures_total", 'workflow="other"', others),
        ("saga_participant_calls_total", 'code="other",method="other",service="other"', others),
        ("saga_participant_call_duration_seconds_count", 'method="other",service="other"', others),
        ("saga_undo_debt_oldest_seconds", 'workflow="other"', 9999),
    ):
        assert text.count(f"\n{name}{{") == MAX_NAMES + 1
        assert f"\n{name}{{{labels}}} {value:.1f}\n" in text
    assert text.count("\nsaga_undo_debt{") == 2 * (MAX_NAMES + 1)
    assert f'\nsaga_undo_debt{{state="failed",workflow="other"}} {others:.1f}\n' in text
    assert f'\nsaga_undo_debt{{state="pending",workflow="other"}} {2 * others:.1f}\n' in text
    assert 'saga_attempts_total{action="EXECUTE",code="other"} 10000.0' in text
    assert 'saga_http_requests_total{method="other",route="none",status="405"} 10000.0' in text
    assert len(text.splitlines()) < 20_000
    # What is owed no longer is not told any more.
    meter.set_store_counts({}, [])
    assert "\nsaga_undo_debt{" not in meter.render().decode()


async def test_a_scrape_asks_the_store_once_in_a_while_however_many_come(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    count = site.house.store.undo_debt

    async def counted() -> Sequence[UndoDebt]:
        nonlocal asked
        asked += 1
        return await count()

    monkeypatch.setattr(site.house.store, "undo_debt", counted)
    for _ in range(5):
        assert "saga_store_counted_timestamp_seconds 1" in (await site.client.get("/metrics")).text
    assert asked == 1


async def test_the_page_of_sagas_lists_filters_and_leads_to_a_saga(site: Site) -> None:
    one = await site.start(correlation_id="<script>alert(1)</script>")
    await site.ended(one)
    page = await site.client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert f'href="/sagas/{one}"' in page.text
    assert "COMPLETED" in page.text
    assert "<script>" not in page.text
    assert "&lt;script&gt;" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    empty = await site.client.get("/?status=FAILED&workflow_name=&correlation_id=")
    assert (empty.status_code, one in empty.text) == (200, False)
    bad = await site.client.get("/?status=%3Cb%3E")
    assert (bad.status_code, "<b>" in bad.text) == (400, False)


async def test_the_page_of_sagas_goes_on_to_older_ones(site: Site) -> None:
    ids = [await site.start() for _ in range(21)]
    page = await site.client.get("/")
    older = re.search(r'href="(/\?cursor=[^"]+)"', page.text)
    assert older is not None
    assert ids[0] in (await site.client.get(older[1])).text


async def test_the_page_of_a_saga_is_a_timeline_with_the_undo_beside_each_step(site: Site) -> None:
    site.house.answers["Payment.Charge"] = [REFUSED]
    saga_id = await site.start(payload={"order_id": "o-1"})
    await site.ended(saga_id)
    page = await site.client.get(f"/sagas/{saga_id}")
    assert page.status_code == 200
    first, second = re.findall(r"<tr>\s*<td>\d</td>(.*?)</tr>", page.text, re.S)
    assert re.search(r"reserve.*EXECUTE|reserve.*SUCCESS.*SUCCESS", first, re.S)
    assert re.search(r"charge.*FAILED.*card declined.*has no undo", second, re.S)
    assert "o-1" in page.text
    assert "reload.js" not in page.text


async def test_the_page_of_a_running_saga_looks_again_and_names_the_undo_to_come(site: Site) -> None:
    site.house.answers["Payment.Charge"] = [HANGS]
    page = await site.client.get(f"/sagas/{await site.start()}")
    assert "by Inventory.Release" in page.text
    assert "reload.js" in page.text


async def test_a_page_of_no_saga_is_404_and_what_pages_need_is_served(site: Site) -> None:
    page = await site.client.get("/sagas/%3Cscript%3E")
    assert (page.status_code, "<script>" in page.text) == (404, False)
    for path, kind in (("/static/style.css", "text/css"), ("/static/reload.js", "javascript")):
        answer = await site.client.get(path)
        assert (answer.status_code, kind in answer.headers["content-type"]) == (200, True)
    for path in ("/static/", "/static/%2e%2e/app.py", "/static/nope"):
        assert (await site.client.get(path)).status_code == 404
