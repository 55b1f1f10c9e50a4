"""The undo debt beside a saga that gets into it and out again: what is told at each point is what is owed then."""

from __future__ import annotations

import trio.testing

from saga.model import SagaStatus
from saga.ports import Answer, Outcome
from saga.service import StartSaga
from tests.support.orchestrator import HANGS, REFUSED, House, orchestrator

DONE = Answer(outcome=Outcome.DONE, response={})


async def owed(house: House) -> tuple[int, int] | None:
    """Failed and pending, once nothing moves any more; None: no debt."""
    await trio.testing.wait_all_tasks_blocked(0.01)
    debts = await house.service.undo_debt()
    assert len(debts) <= 1
    return (debts[0].failed, debts[0].pending) if debts else None


async def in_hand(house: House) -> str:
    """A saga whose one compensation is under way, and hangs."""
    house.answers["Inventory.Release"] = [HANGS]
    house.answers["Payment.Charge"] = [REFUSED]
    return (await house.service.start(StartSaga(workflow_name="order"))).saga.saga_id


async def test_the_debt_follows_a_compensation_that_fails_again_and_again_until_it_is_done() -> None:
    async with orchestrator() as house:
        house.answers["Payment.Charge"] = [HANGS]
        saga_id = (await house.service.start(StartSaga(workflow_name="order"))).saga.saga_id
        assert await owed(house) is None  # it may still succeed
        house.answers["Inventory.Release"] = [HANGS, REFUSED, DONE]
        await house.service.cancel(saga_id)
        assert await owed(house) == (0, 1)  # a cancelled saga owes what it undoes
        house.let_go.set()
        assert await owed(house) == (1, 0)
        await house.service.retry_compensation(saga_id)
        assert await owed(house) == (1, 0)  # in vain
        await house.service.retry_compensation(saga_id)
        assert await owed(house) is None
        assert (await house.service.saga(saga_id)).status is SagaStatus.CANCELLED


async def test_a_cancel_amid_a_compensation_changes_nothing_about_the_debt_and_a_mark_ends_it() -> None:
    async with orchestrator() as house:
        saga_id = await in_hand(house)
        assert await owed(house) == (0, 1)
        await house.service.cancel(saga_id)
        assert await owed(house) == (0, 1)
        house.let_go.set()
        assert await owed(house) == (1, 0)
        await house.service.retry_compensation(saga_id, {"reserve": {"mark_done": True, "reason": "by hand"}})
        assert await owed(house) is None
