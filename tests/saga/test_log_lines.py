"""The lines people look for when they ask what became of a saga, and their order."""

from __future__ import annotations

import logging

import pytest
import trio.testing
from trio.testing import MockClock

from saga import log_fields
from saga.audit import Door, Requester
from saga.log_fields import about
from saga.model import SagaStatus
from saga.service import StartSaga
from tests.support.orchestrator import HANGS, ORDER, REFUSED, House, orchestrator

ANN = Requester(principal="ann", door=Door.REST, request_id="r-1")


async def ended(house: House, saga_id: str) -> SagaStatus:
    with house.service.watch(saga_id) as watch:
        while (saga := await watch.next()) is not None:
            last = saga
    return last.status


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the engine, without the ids of sagas."""
    found = []
    for record in caplog.records:
        if record.name.startswith("saga."):
            event, *fields = record.getMessage().split(" ")
            fields = [field for field in fields if not field.startswith(("saga_id=", "secs="))]
            found.append(" ".join([record.levelname, event, *fields]))
    return found


async def test_a_saga_whose_undo_fails_and_is_mended_tells_its_story_in_order(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="saga")
    async with orchestrator() as house:
        house.answers = {"Payment.Charge": [REFUSED], "Inventory.Release": [REFUSED]}
        saga_id = (await house.service.start(StartSaga(workflow_name="order"))).saga.saga_id
        assert await ended(house, saga_id) is SagaStatus.FAILED
        by_hand = {"reserve": {"mark_done": True, "reason": "freed at the desk"}}
        await house.service.retry_compensation(saga_id, by_hand, ANN)
    refused = "code=FAILED_PRECONDITION message='card declined'"
    assert told(caplog) == [
        f"INFO attempt_failed step=charge action=EXECUTE attempt=1 {refused}",
        f"INFO attempt_failed step=reserve action=COMPENSATE attempt=1 {refused}",
        f"ERROR compensation_failed step=reserve {refused} hint=mend the cause, then POST"
        f" /api/v1/sagas/{saga_id}/retry-compensation when the saga has ended",
        "INFO saga_ended workflow=order status=FAILED error=step charge failed: FAILED_PRECONDITION: card declined",
        "INFO compensation_retry_accepted failed=1 corrected=0 marked_done=1 principal=ann",
        "INFO saga_ended workflow=order status=FAILED error=step charge failed: FAILED_PRECONDITION: card declined",
    ]


async def test_a_cancel_and_a_new_version_are_told_with_who_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="saga")
    async with orchestrator() as house:
        house.answers = {"Payment.Charge": [HANGS]}
        await house.service.register_workflow(ORDER + "timeout_secs: 60\n", ANN)
        await house.service.register_workflow(ORDER + "timeout_secs: 60\n", ANN)  # nothing new, nothing told
        saga_id = (await house.service.start(StartSaga(workflow_name="order"))).saga.saga_id
        await trio.testing.wait_all_tasks_blocked()  # the charge hangs
        await house.service.cancel(saga_id, ANN)
        assert await ended(house, saga_id) is SagaStatus.CANCELLED
    assert told(caplog) == [
        "INFO workflow_registered name=order version=2 principal=ann",
        "INFO cancel_accepted status=RUNNING principal=ann",
        "INFO saga_ended workflow=order status=CANCELLED error=cancelled during step charge",
    ]


async def test_the_end_that_is_hoped_for_is_a_line_for_those_who_want_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="saga.runner")
    async with orchestrator() as house:
        with about(request_id="r-1"):
            saga_id = (await house.service.start(StartSaga(workflow_name="order"))).saga.saga_id
        assert await ended(house, saga_id) is SagaStatus.COMPLETED
    assert told(caplog) == ["DEBUG saga_ended workflow=order status=COMPLETED error=None"]


class Contexts(logging.Handler):
    """Whom each event was about, as the formatter sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, dict[str, str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.seen[record.getMessage().partition(" ")[0]] = dict(log_fields.current())


async def test_what_keeps_a_saga_from_being_begun_is_told_about_that_saga(autojump_clock: MockClock) -> None:
    contexts = Contexts()
    logger = logging.getLogger("saga.supervisor")
    logger.addHandler(contexts)
    try:
        async with orchestrator() as house:
            house.supervisor._services = {"inventory"}  # as of a worker that lacks the other one
            house.supervisor._backlog = True  # somebody older waits, so the saga waits to be claimed
            started = await house.service.start(StartSaga(workflow_name="order", correlation_id="c-1"))
            await trio.testing.wait_all_tasks_blocked()
    finally:
        logger.removeHandler(contexts)
    saga_id = started.saga.saga_id
    assert contexts.seen["service_not_configured"] == {
        "saga_id": saga_id,
        "correlation_id": "c-1",
        "trace_id": saga_id.replace("-", ""),
    }
