"""What is said of a store that goes away, and how little."""

from __future__ import annotations

import logging

import pytest
import trio
from trio.testing import MockClock

from saga import log_fields
from saga.store_outage import StoreOutage


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="saga.store")
    return caplog


def lines(told: pytest.LogCaptureFixture) -> list[str]:
    return [f"{record.levelname} {record.getMessage()}" for record in told.records]


async def test_an_outage_is_two_lines_and_one_each_half_minute_however_much_is_tried(
    autojump_clock: MockClock, told: pytest.LogCaptureFixture
) -> None:
    outage = StoreOutage()
    for _ in range(70):
        for _ in range(100):
            outage.failed("moves", "no route")
        outage.failed("claims", "no route")
        await trio.sleep(1)
    outage.answered("moves")
    assert len(told.records) == 3  # claims have not been answered yet
    await trio.sleep(1)
    outage.answered("claims")
    outage.answered("claims")
    assert lines(told) == [
        "WARNING store_unavailable tried=moves error=no route",
        "WARNING store_still_unavailable secs=30.0 failed=claims:30,moves:3001 error=no route",
        "WARNING store_still_unavailable secs=60.0 failed=claims:60,moves:6001 error=no route",
        "INFO store_back secs=70.0 failed=claims:70,moves:7000",
    ]


async def test_a_store_that_fails_now_and_then_is_one_outage(
    autojump_clock: MockClock, told: pytest.LogCaptureFixture
) -> None:
    outage = StoreOutage()
    for _ in range(100):
        outage.failed("moves", "too slow")
        outage.answered("moves")
        await trio.sleep(0.1)
    await trio.sleep(2)
    outage.answered("claims")
    outage.failed("moves", "again")
    assert [record.getMessage().split()[0] for record in told.records] == [
        "store_unavailable",
        "store_back",
        "store_unavailable",
    ]


async def test_what_is_never_tried_again_does_not_keep_an_outage_open(
    autojump_clock: MockClock, told: pytest.LogCaptureFixture
) -> None:
    outage = StoreOutage()
    outage.failed("moves", "away")
    await trio.sleep(5)
    outage.answered("claims")
    assert len(told.records) == 1
    await trio.sleep(5)
    outage.answered("claims")
    assert lines(told)[1:] == ["INFO store_back secs=5.0 failed=moves:1"]


async def test_the_lines_are_about_no_saga_and_no_request(autojump_clock: MockClock) -> None:
    seen: list[dict[str, str]] = []

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(dict(log_fields.current()))

    handler, logger = Noted(), logging.getLogger("saga.store")
    logger.addHandler(handler)
    try:
        with log_fields.about(request_id="r-1", saga_id="s-1"):
            StoreOutage().failed("moves", "away")
            assert log_fields.current() == {"request_id": "r-1", "saga_id": "s-1"}
    finally:
        logger.removeHandler(handler)
    assert seen == [{}]
