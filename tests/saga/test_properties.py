"""Random workflows meet random answers, cancels, deadlines and crashes; what must hold of every saga is checked.

`Ledger` is the part of a store's contract that decides what a worker gets to see: the fence against a cancel request,
and what a saga looks like when it is read back after a crash. Everything else is the product's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import event, given, settings
from hypothesis import strategies as st

from saga.facts import Call, CancelObserved, Cut, DeadlinePassed, Fact, UndoRetryRequested
from saga.model import EventType, LogEntry, Saga, SagaStatus, StepAction, StepStatus, UndoCorrection
from saga.ports import Answer, Outcome, Record
from saga.transitions import ANNOUNCED, TRANSITIONS, advance, judge, next_command
from saga.workflow import OnUnknown, RetryPolicy, Step, WorkflowDefinition, decode_definition, encode_definition
from tests.saga.samples import AT, BEGAN, GOT, SENT, saga

CORRECTED = {"receipt": "r-7"}
EXECUTE, COMPENSATE = StepAction.EXECUTE, StepAction.COMPENSATE

# The same examples on every machine and no time limit: a slow runner must not turn a rule into a flake.
thorough = settings(derandomize=True, deadline=None, max_examples=200)

steps: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    compensate=st.sampled_from(["Svc.Undo", "Svc.Undo", None]),
    on_unknown=st.sampled_from(OnUnknown),
    retry=st.builds(RetryPolicy, max_attempts=st.integers(1, 3)),
    compensate_retry=st.builds(RetryPolicy, max_attempts=st.integers(1, 2)),
)


@st.composite
def workflows(draw: st.DrawFn) -> WorkflowDefinition:
    drawn = draw(st.lists(steps, min_size=1, max_size=5))
    return WorkflowDefinition(
        name="w",
        steps=tuple(
            Step(name=f"s{index}", service="svc", method="Svc.Do", **fields) for index, fields in enumerate(drawn)
        ),
        timeout_secs=draw(st.sampled_from([None, 60.0])),
    )


ANSWERS = {
    "done": Answer(outcome=Outcome.DONE, response=GOT),
    "refused": Answer(outcome=Outcome.REFUSED, code="ABORTED", message="no"),
    "final": Answer(outcome=Outcome.REFUSED, code="NOT_FOUND", message="no"),
    "unknown": Answer(outcome=Outcome.UNKNOWN, code="UNAVAILABLE"),
    "timeout": Answer(outcome=Outcome.UNKNOWN, code="DEADLINE_EXCEEDED"),
    "not done": Answer(outcome=Outcome.NOT_DONE, code="UNAVAILABLE"),
    "permanent": Answer(outcome=Outcome.NOT_DONE, code="INTERNAL", permanent=True),
}
happenings = st.lists(
    st.sampled_from(["done", "done", "done", *ANSWERS, "cancel", "cancel elsewhere", "deadline", "crash", "handover"]),
    max_size=40,
)


class Ledger:
    """One saga in a store, and one worker's copy of it."""

    def __init__(self, definition: WorkflowDefinition) -> None:
        self.definition = definition
        self.stored = saga(payload={"x": 1}, workflow_name="w")
        self.mine = self.stored
        self.logs: list[LogEntry] = []
        self.events: list[EventType] = []
        self.path: list[Saga] = [self.stored]
        self.records = 0
        self.calls: list[tuple[Call, SagaStatus]] = []
        self.cancelled_in: SagaStatus | None = None
        self.finals = 0

    def request_cancel(self) -> None:
        """The durable request; the worker does not know of it yet."""
        if not self.stored.status.is_terminal and not self.stored.cancel_requested:
            self.cancelled_in = self.stored.status
            self.stored = msgspec.structs.replace(self.stored, cancel_requested=True)

    def hear_cancel(self) -> None:
        self.mine = msgspec.structs.replace(self.mine, cancel_requested=self.stored.cancel_requested)

    def read_back(self, *, crashed: bool) -> None:
        """Another worker claims the saga; after a crash an attempt may have been under way."""
        unknown = self.stored.outcome_unknown or (crashed and self.stored.status is SagaStatus.RUNNING)
        text = msgspec.json.encode(
            msgspec.structs.replace(self.stored, outcome_unknown=unknown, epoch=self.stored.epoch + 1)
        )
        self.stored = msgspec.json.decode(text, type=Saga)
        # What it has to do was never written down: it is worked out from the row, by a definition read from its text.
        again = decode_definition(encode_definition(self.definition))
        asked = msgspec.structs.replace(self.mine, cancel_requested=self.stored.cancel_requested)
        assert next_command(self.stored, again) == next_command(asked, self.definition)
        self.mine = self.stored

    def write(self, fact: Fact) -> None:
        """As the runner does it: what a cancel request bars is decided again from the row."""
        record = advance(self.mine, self.definition, fact, AT)
        if self.is_barred(record):
            record = advance(self.stored, self.definition, fact, AT)
            assert not self.is_barred(record)
        self.check(record)
        self.records += 1
        self.logs += record.logs
        self.events += [event.event_type for event in record.events]
        self.path += record.path
        self.finals += record.after.status.is_terminal
        self.stored = msgspec.structs.replace(
            record.after,
            cancel_requested=self.stored.cancel_requested or record.after.cancel_requested,
            revision=record.before.revision + 1,
        )
        self.mine = self.stored

    def is_barred(self, record: Record) -> bool:
        ends_uncancelled = record.after.status in (SagaStatus.COMPLETED, SagaStatus.FAILED)
        return ends_uncancelled and self.stored.cancel_requested

    def check(self, record: Record) -> None:
        assert record.after.revision == record.before.revision + 1
        assert record.after.current_step >= record.before.current_step
        assert record.path[-1] == record.after
        statuses = [record.before.status, *(state.status for state in record.path)]
        for status, to in pairwise(statuses):
            assert to in TRANSITIONS[status].values()
        if record.after.status.is_terminal:
            assert record.after.undo_plan == ()
            assert record.after.attempt == 0
            assert record.after.undo_corrections == {}
            assert record.retry_in_secs is None
        assert record.after.undo_corrections.keys() <= set(record.after.undo_plan)

    def step(self, happening: str) -> bool:
        """One thing happens. False: the saga is over."""
        if happening == "cancel elsewhere":
            self.request_cancel()
            return True
        if happening in ("crash", "handover"):
            if not self.stored.status.is_terminal:
                self.read_back(crashed=happening == "crash")
            return True
        command = next_command(self.mine, self.definition)
        if command is None:
            return False
        if not isinstance(command, Call):
            if happening == "cancel":
                self.request_cancel()
                self.hear_cancel()
                return True
            self.write(command)
            return True
        assert not self.mine.status.is_terminal
        executing = command.action is EXECUTE
        cut = Cut(request=SENT, started_at=BEGAN)
        if happening == "cancel":
            self.request_cancel()
            if executing:
                self.calls.append((command, self.mine.status))
                self.write(CancelObserved(cut=cut))
            else:
                self.hear_cancel()
        elif happening == "deadline":
            if executing and self.definition.timeout_secs is not None:
                # Half of the time nothing was running: attempt 1 that is due, or a pause between two.
                self.write(DeadlinePassed(cut=cut if self.records % 2 else None))
        else:
            self.calls.append((command, self.mine.status))
            answer = ANSWERS[happening]
            self.write(
                judge(self.definition, command, answer, request=SENT, started_at=BEGAN, draw=0.0),
            )
        return True


def live(definition: WorkflowDefinition, story: Sequence[str], then: str = "done") -> Ledger:
    """The saga after the story, brought to its end by participants that all answer `then`."""
    ledger = Ledger(definition)
    for happening in story:
        ledger.step(happening)
    for _ in range(200):
        if not ledger.step(then):
            return ledger
    raise AssertionError("the saga does not end")


def logged(ledger: Ledger, action: StepAction, *statuses: StepStatus) -> list[int]:
    return [log.step_index for log in ledger.logs if log.action is action and (not statuses or log.status in statuses)]


@thorough
@given(workflows(), happenings, st.sampled_from(["done", "final", "unknown"]))
def test_a_saga_reaches_exactly_one_final_state(definition: WorkflowDefinition, story: list[str], then: str) -> None:
    ledger = live(definition, story, then)
    assert ledger.stored.status.is_terminal
    assert ledger.finals == 1
    assert [state.status.is_terminal for state in ledger.path].count(True) == 1
    event(str(ledger.stored.status))
    for _ in range(3):
        assert not ledger.step("done")
    assert ledger.finals == 1


@thorough
@given(workflows(), happenings)
def test_nothing_is_called_after_a_final_state(definition: WorkflowDefinition, story: list[str]) -> None:
    ledger = live(definition, story)
    before = len(ledger.calls)
    for happening in ("done", "unknown", "cancel", "deadline", "crash", "handover", "cancel elsewhere"):
        ledger.step(happening)
    assert len(ledger.calls) == before
    assert all(not status.is_terminal for _, status in ledger.calls)
    assert next_command(ledger.stored, definition) is None


@thorough
@given(workflows(), happenings)
def test_compensations_are_exactly_the_succeeded_steps_in_reverse(
    definition: WorkflowDefinition, story: list[str]
) -> None:
    ledger = live(definition, story)
    succeeded = logged(ledger, EXECUTE, StepStatus.SUCCESS)
    assert succeeded == list(range(ledger.stored.current_step))
    undone = logged(ledger, COMPENSATE)
    if ledger.stored.status is SagaStatus.COMPLETED:
        assert succeeded == list(range(len(definition.steps)))
        assert undone == []
        return
    if SagaStatus.COMPENSATING not in {state.status for state in ledger.path}:
        assert (succeeded, undone, ledger.calls) == ([], [], [])
        return
    first_undo = next(state for state in ledger.path if state.status is SagaStatus.COMPENSATING)
    failed_step = first_undo.current_step
    expected = succeeded[::-1]
    if undone != expected:
        # Only the step that failed without anybody knowing whether it took effect may come before them.
        assert undone == [failed_step, *expected]
        assert definition.steps[failed_step].on_unknown is OnUnknown.COMPENSATE
        event("an unknown step was undone first")
    skipped = logged(ledger, COMPENSATE, StepStatus.SKIPPED)
    assert skipped == [index for index in undone if definition.steps[index].compensate is None]
    called = {call.step_index for call, _ in ledger.calls if call.action is COMPENSATE}
    assert called == set(undone) - set(skipped)


@thorough
@given(workflows(), happenings)
def test_a_step_whose_outcome_is_unknown_is_undone_if_its_workflow_asks_for_it(
    definition: WorkflowDefinition, story: list[str]
) -> None:
    ledger = Ledger(definition)
    maybe: set[int] = set()
    for happening in [*story, *["done"] * 60]:
        before, calls = ledger.mine, len(ledger.calls)
        ledger.step(happening)
        index = before.current_step
        if len(ledger.calls) > calls and ledger.calls[-1][0].action is EXECUTE:
            if happening in ("unknown", "timeout", "cancel"):
                maybe.add(index)
            elif happening == "done":
                maybe.discard(index)
        if happening == "crash" and before.status is SagaStatus.RUNNING:
            maybe.add(index)
    undone = set(logged(ledger, COMPENSATE))
    if any(state.status is SagaStatus.COMPENSATING for state in ledger.path):
        for index in maybe:
            if definition.steps[index].on_unknown is OnUnknown.COMPENSATE:
                assert index in undone


@thorough
@given(workflows(), happenings)
def test_every_step_that_was_reached_has_exactly_one_execute_log(
    definition: WorkflowDefinition, story: list[str]
) -> None:
    ledger = live(definition, story)
    executed = logged(ledger, EXECUTE)
    assert len(executed) == len(set(executed))
    assert executed == sorted(executed)
    called = {call.step_index for call, _ in ledger.calls if call.action is EXECUTE}
    assert called <= set(executed)
    undone = logged(ledger, COMPENSATE)
    assert len(undone) == len(set(undone))


@thorough
@given(workflows(), happenings)
def test_the_events_tell_every_change_of_state_once_and_in_order(
    definition: WorkflowDefinition, story: list[str]
) -> None:
    ledger = live(definition, story)
    entered = []
    for before, now in pairwise(ledger.path):
        if now.status is not before.status:
            entered.append(ANNOUNCED[now.status])
    moves = [told for told in ledger.events if told is not EventType.SAGA_COMPENSATION_FAILED]
    assert moves == entered
    given_up = logged(ledger, COMPENSATE, StepStatus.FAILED, StepStatus.TIMEOUT)
    assert ledger.events.count(EventType.SAGA_COMPENSATION_FAILED) == len(given_up)
    assert list(ledger.stored.undo_failed) == given_up
    assert ledger.stored.compensation_failed is bool(given_up)


@thorough
@given(workflows(), happenings)
def test_every_record_raises_the_revision_by_one(definition: WorkflowDefinition, story: list[str]) -> None:
    ledger = live(definition, story)
    assert ledger.stored.revision == ledger.records


@thorough
@given(workflows(), happenings, st.sampled_from(["done", "final", "unknown"]))
def test_a_cancel_that_was_accepted_holds(definition: WorkflowDefinition, story: list[str], then: str) -> None:
    ledger = live(definition, story, then)
    if ledger.cancelled_in is not None:
        event(f"cancelled in {ledger.cancelled_in}")
        assert ledger.stored.status is SagaStatus.CANCELLED
    else:
        assert ledger.stored.status is not SagaStatus.CANCELLED
    assert (ledger.stored.error_message is None) is (ledger.stored.status is SagaStatus.COMPLETED)


@thorough
@given(workflows(), happenings)
def test_no_attempt_goes_beyond_its_policy(definition: WorkflowDefinition, story: list[str]) -> None:
    ledger = live(definition, story)
    for call, _ in ledger.calls:
        assert 1 <= call.attempt <= definition.steps[call.step_index].policy(call.action).max_attempts


@thorough
@given(workflows(), happenings, st.integers(0, 12))
def test_failed_compensations_run_again_are_exactly_those_that_failed(
    definition: WorkflowDefinition, story: list[str], crash_at: int
) -> None:
    ledger = live(definition, story, "final")
    failed = list(ledger.stored.undo_failed)
    if not failed:
        return
    event("compensations failed")
    end, done_before = ledger.stored.status, len(ledger.logs)
    ledger.write(UndoRetryRequested())
    for turn in range(100):
        if turn == crash_at and not ledger.stored.status.is_terminal:
            ledger.read_back(crashed=True)
        if not ledger.step("done"):
            break
    assert [log.step_index for log in ledger.logs[done_before:]] == failed
    assert (ledger.stored.status, ledger.stored.compensation_failed) == (end, False)


corrections = st.sampled_from(
    [
        None,
        UndoCorrection(request=CORRECTED),
        UndoCorrection(request=CORRECTED, reason="typo"),
        UndoCorrection(reason="x"),
    ]
)
undo_happenings = st.lists(
    st.sampled_from([*ANSWERS, "crash", "handover", "cancel", "cancel elsewhere", "deadline"]), max_size=20
)


@thorough
@given(workflows(), happenings, st.lists(corrections, min_size=5, max_size=5), undo_happenings)
def test_a_correction_is_good_for_one_run_of_one_compensation_whatever_happens_meanwhile(
    definition: WorkflowDefinition, story: list[str], drawn: list[UndoCorrection | None], then: list[str]
) -> None:
    ledger = live(definition, story, "final")
    failed = list(ledger.stored.undo_failed)
    if not failed:
        return
    corrected = {index: one for index in failed if (one := drawn[index]) is not None}
    event(f"corrected {len(corrected)} of {len(failed)}")
    logs_before, calls_before = len(ledger.logs), len(ledger.calls)
    ledger.write(UndoRetryRequested(corrections=corrected))
    for happening in [*then, *["done"] * 60]:
        left = ledger.stored.undo_plan
        # What is left to be undone still has what was said of it, and nothing that has ended has.
        assert ledger.stored.undo_corrections == {index: corrected[index] for index in left if index in corrected}
        ledger.step(happening)
    assert ledger.stored.status.is_terminal
    assert ledger.stored.undo_corrections == {}
    by_hand = {index for index, one in corrected.items() if one.request is None}
    assert {call.step_index for call, _ in ledger.calls[calls_before:]} == set(failed) - by_hand
    again = ledger.logs[logs_before:]
    assert [log.step_index for log in again] == failed
    for log in again:
        one = corrected.get(log.step_index)
        if log.step_index in by_hand:
            assert (log.status, log.attempts, log.error_message) == (StepStatus.SUCCESS, 0, "done by hand: x")
        else:
            assert log.attempts >= 1
            assert ("typo" in (log.error_message or "")) is (one is not None and one.reason is not None)
    assert ledger.stored.undo_failed == tuple(log.step_index for log in again if log.status is not StepStatus.SUCCESS)
    assert ledger.stored.compensation_failed is bool(ledger.stored.undo_failed)
    asked = ledger.cancelled_in is not None
    assert ledger.stored.status is (SagaStatus.CANCELLED if asked else SagaStatus.FAILED)


@thorough
@given(workflows(), happenings)
def test_responses_are_those_of_the_succeeded_steps(definition: WorkflowDefinition, story: list[str]) -> None:
    ledger = live(definition, story)
    for log in ledger.logs:
        if log.action is EXECUTE:
            assert (log.response_payload == GOT) is (log.status is StepStatus.SUCCESS)
