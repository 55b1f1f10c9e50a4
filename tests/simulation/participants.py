"""The participants of all sagas: they keep the rules of docs/semantics.md, whatever the network makes of a call.

An effect happens once for its idempotency key, an undo of what was never done succeeds, and an action whose undo has
come is refused. The ledger that is left is what the audit balances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from saga.model import Json, StepAction
from saga.ports import Answer, Outcome, StepCall
from tests.simulation.chance import Course

if TYPE_CHECKING:
    from tests.simulation.world import Worker, World

TOO_LATE = Answer(outcome=Outcome.REFUSED, code="FAILED_PRECONDITION", message="undone already")


class Participants:
    """`effects` and `undone` hold the idempotency prefix `<saga id>:<step index>` of each step."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._replies: dict[str, Answer] = {}
        self.effects: dict[str, int] = {}
        self.undone: set[str] = set()

    async def call(self, worker: Worker, call: StepCall) -> Answer:
        world = self._world
        world.audit.call_begins(worker, call)
        course = world.chance.course(world.climate)
        answer: Answer | None = None
        try:
            world.may_die(worker, before=True)
            answer = await self._carry(worker, call, course)
        finally:
            world.audit.call_ends(worker, call, answer)
        return answer

    async def _carry(self, worker: Worker, call: StepCall, course: Course) -> Answer:
        if course.afterwards_secs is not None:
            self._world.nursery.start_soon(self._arrive_later, call, course.afterwards_secs)
        if course.there_secs is None:
            if course.answer is None:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            assert course.answer is not None
            return course.answer
        try:
            if course.there_secs:
                await trio.sleep(course.there_secs)
            else:
                await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            # Reset while it was on its way: it may be too late to stop it.
            if course.works and self._world.chance.dice.random() < 0.5:
                self._world.nursery.start_soon(self._arrive_later, call, 0.01)
            raise
        answer = self._arrive(call) if course.works else None
        self._world.may_die(worker, before=False)
        if course.back_secs is None:
            await trio.sleep_forever()
        elif course.back_secs:
            await trio.sleep(course.back_secs)
        else:
            await trio.lowlevel.checkpoint()
        if course.answer is not None:
            return course.answer
        assert answer is not None
        return answer

    async def _arrive_later(self, call: StepCall, secs: float) -> None:
        await trio.sleep(secs)
        self._arrive(call)

    def _arrive(self, call: StepCall) -> Answer:
        """The participant acts, or gives the answer it gave before."""
        earlier = self._replies.get(call.idempotency_key)
        if earlier is not None:
            return earlier
        place = call.idempotency_key.rpartition(":")[0]
        executing = call.action is StepAction.EXECUTE
        if executing and place in self.undone:
            answer = TOO_LATE
        elif executing:
            self.effects[place] = self.effects.get(place, 0) + 1
            answer = Answer(outcome=Outcome.DONE, response=self.token(call))
        else:
            self.undone.add(place)
            self.effects.pop(place, None)
            answer = Answer(outcome=Outcome.DONE, response={})
        self._replies[call.idempotency_key] = answer
        self._world.chance.note("arrives", call.idempotency_key, answer.code)
        return answer

    @staticmethod
    def token(call: StepCall) -> Json:
        """What the next step has to bring along."""
        return {"token": f"{call.saga_id}/{call.step_index}"}
