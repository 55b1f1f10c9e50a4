"""The report of readiness over a real store in memory: what is asked at once, how long it may take, what is logged."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import trio
import trio.testing

from saga.authentication import KeysState
from saga.errors import Unavailable
from saga.readiness import CHECK_SECS, SCHEMA_KEPT_SECS, Health, Readiness
from tests.support.orchestrator import orchestrator


async def fails() -> None:
    raise Unavailable("no route to 10.1.2.3")


async def test_parts_that_hang_hold_up_a_report_for_one_timeout_together(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with orchestrator() as house:
        monkeypatch.setattr(house.store, "ping", trio.sleep_forever)
        monkeypatch.setattr(house.store, "schema_state", trio.sleep_forever)
        readiness = Readiness(house.service, house.drain, {"kafka": trio.sleep_forever})
        began = trio.current_time()
        report = await readiness.report()
        assert trio.current_time() - began == pytest.approx(CHECK_SECS)
        assert report.health is Health.UNHEALTHY
        assert {name for name, word in report.checks.items() if word == "timeout"} == {
            "database",
            "migrations",
            "kafka",
        }


async def test_the_log_tells_a_change_once_with_what_is_wrong_and_that_it_is_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="saga.readiness")
    async with orchestrator() as house:
        broker_is_away = True

        async def kafka() -> None:
            if broker_is_away:
                await fails()

        readiness = Readiness(house.service, house.drain, {"kafka": kafka})
        for _ in range(3):
            assert (await readiness.report()).health is Health.DEGRADED
        broker_is_away = False
        for _ in range(3):
            assert (await readiness.report()).health is Health.HEALTHY
    assert [record.getMessage() for record in caplog.records] == [
        "check_failed check=kafka outcome=unavailable error=no route to 10.1.2.3",
        "readiness_changed before=healthy now=degraded checks=kafka:unavailable",
        "readiness_changed before=degraded now=healthy checks=ok",
    ]


async def test_the_schema_is_asked_for_once_in_a_while_however_many_ask(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with orchestrator() as house:
        asked = 0
        state = house.store.schema_state

        async def counted() -> object:
            nonlocal asked
            asked += 1
            return await state()

        monkeypatch.setattr(house.store, "schema_state", counted)
        readiness = Readiness(house.service, house.drain)
        for _ in range(5):
            assert (await readiness.report()).health is Health.HEALTHY
        assert asked == 1
        await trio.sleep(SCHEMA_KEPT_SECS)
        assert (await readiness.report()).is_ready
        assert asked == 2


async def test_without_keys_nobody_can_be_let_in_and_with_old_ones_most_can() -> None:
    async with orchestrator() as house:
        for state, health, word in (
            (KeysState.MISSING, Health.UNHEALTHY, "missing"),
            (KeysState.OLD, Health.DEGRADED, "old"),
            (KeysState.KNOWN, Health.HEALTHY, "ok"),
        ):
            readiness = Readiness(house.service, house.drain, keys_state=partial(KeysState, state))
            report = await readiness.report()
            assert (report.health, report.checks["keys"]) == (health, word)
        assert "keys" not in (await Readiness(house.service, house.drain).report()).checks
