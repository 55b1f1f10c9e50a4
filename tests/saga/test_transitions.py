"""The table of states, walked in full and in what is missing from it; then every rule of the core, one test each."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from saga import transitions
from saga.errors import BrokenRule
from saga.facts import (
    AllStepsDone,
    Began,
    Call,
    CancelObserved,
    CompensationFailed,
    CompensationMarkedDone,
    CompensationRetried,
    CompensationSkipped,
    CompensationSucceeded,
    DeadlinePassed,
    Fact,
    Made,
    StepFailed,
    StepRetried,
    StepSucceeded,
    UndoDone,
    UndoDoneAfterCancel,
    UndoRetryRequested,
)
from saga.model import EventType, Saga, SagaStatus, StepAction, StepStatus, UndoCorrection
from saga.ports import Answer, Outcome
from saga.transitions import ANNOUNCED, TRANSITIONS, advance, judge, next_command
from saga.workflow import OnUnknown, WorkflowDefinition
from tests.saga.samples import (
    AT,
    BEGAN,
    GOT,
    SENT,
    after,
    began,
    changed,
    compensating,
    cut,
    done,
    failed,
    patient,
    refused,
    retried,
    running,
    saga,
    step,
    succeeded,
    undo_failed,
    undo_retried,
    undone,
    unknown,
    workflow,
)

S = SagaStatus
E = EventType
STARTED, RUNNING, COMPENSATING = S.STARTED, S.RUNNING, S.COMPENSATING
COMPLETED, FAILED, CANCELLED = S.COMPLETED, S.FAILED, S.CANCELLED
EXECUTE, COMPENSATE = StepAction.EXECUTE, StepAction.COMPENSATE

BY_HAND = UndoCorrection(reason="refunded at the desk")
CORRECTED = UndoCorrection(request={"receipt": "r-7"})

FACTS: dict[type[Fact], Fact] = {
    Began: began,
    StepSucceeded: succeeded(),
    StepRetried: retried(4.0),
    StepFailed: failed(),
    DeadlinePassed: DeadlinePassed(cut=cut),
    CancelObserved: CancelObserved(cut=cut),
    AllStepsDone: AllStepsDone(),
    CompensationSucceeded: undone(),
    CompensationRetried: undo_retried(4.0),
    CompensationFailed: undo_failed(),
    CompensationSkipped: CompensationSkipped(),
    CompensationMarkedDone: CompensationMarkedDone(),
    UndoDone: UndoDone(),
    UndoDoneAfterCancel: UndoDoneAfterCancel(),
    UndoRetryRequested: UndoRetryRequested(),
}
"""One of each kind; the walks below use them."""


def fact_classes(base: type[Fact] = Fact) -> set[type[Fact]]:
    found: set[type[Fact]] = set()
    for kind in base.__subclasses__():
        found |= {kind} | fact_classes(kind)
    return found - {Made}


def at_home(status: SagaStatus, kind: type[Fact]) -> Saga:
    """A saga of `workflow()` in that state to which that fact can happen."""
    if status is STARTED:
        return saga()
    if status is RUNNING:
        return running(3 if kind is AllStepsDone else 1, attempt=2)
    if status is COMPENSATING:
        plan = () if kind in (UndoDone, UndoDoneAfterCancel) else (1, 0)
        return compensating(*plan, cancel_requested=kind is UndoDoneAfterCancel)
    return saga(
        status,
        current_step=2,
        undo_failed=(1,),
        compensation_failed=True,
        revision=9,
        cancel_requested=status is CANCELLED,
    )


# --- the table as a whole --------------------------------------------------------------------------------------------


def test_every_state_is_in_the_table_final_ones_too() -> None:
    assert set(TRANSITIONS) == set(SagaStatus) == set(ANNOUNCED)


def test_every_fact_is_in_the_table_and_has_its_effect() -> None:
    in_table = {kind for row in TRANSITIONS.values() for kind in row}
    assert in_table == fact_classes() == set(transitions._APPLY) == set(FACTS)


def test_a_completed_saga_never_moves_again_and_other_final_ones_only_for_an_operator() -> None:
    assert TRANSITIONS[COMPLETED] == {}
    assert TRANSITIONS[FAILED] == TRANSITIONS[CANCELLED] == {UndoRetryRequested: COMPENSATING}


def test_the_moves_of_the_seed_are_the_moves_of_the_table() -> None:
    moves = {(status, to) for status, row in TRANSITIONS.items() for to in row.values() if to is not status}
    assert moves == {
        (STARTED, RUNNING),
        (STARTED, CANCELLED),
        (RUNNING, COMPLETED),
        (RUNNING, COMPENSATING),
        (COMPENSATING, FAILED),
        (COMPENSATING, CANCELLED),
        (FAILED, COMPENSATING),
        (CANCELLED, COMPENSATING),
    }


LISTED = [
    pytest.param(status, kind, to, id=f"{status}-{kind.__name__}")
    for status, row in TRANSITIONS.items()
    for kind, to in row.items()
]
UNLISTED = [
    pytest.param(status, kind, id=f"{status}-{kind.__name__}")
    for status in SagaStatus
    for kind in FACTS
    if kind not in TRANSITIONS[status]
]


@pytest.mark.parametrize(("status", "kind", "to"), LISTED)
def test_every_entry_leads_where_the_table_says(status: SagaStatus, kind: type[Fact], to: SagaStatus) -> None:
    before = at_home(status, kind)
    record = advance(before, workflow(), FACTS[kind], AT)
    assert record.path[0].status is to
    assert record.before is before
    assert record.path[-1] == record.after
    assert record.after.revision == before.revision + 1
    announced = [event.event_type for event in record.events]
    if to is not status:
        assert announced[0] is ANNOUNCED[to]
    else:
        assert ANNOUNCED[status] not in announced


@pytest.mark.parametrize(("status", "kind"), UNLISTED)
def test_every_pair_missing_from_the_table_raises_and_leaves_the_saga_as_it_was(
    status: SagaStatus, kind: type[Fact]
) -> None:
    before = at_home(status, kind)
    image = msgspec.json.encode(before)
    with pytest.raises(BrokenRule, match=f"no move from {status} on {kind.__name__}"):
        advance(before, workflow(), FACTS[kind], AT)
    assert msgspec.json.encode(before) == image


# Each entry of the table: the saga before, the fact, exactly the fields that change, the logs, the events, the waits.
# A log: (step, action, status, attempts, sent, received, error). The fields leave out revision: it rises by one.
Log = tuple[int, StepAction, StepStatus, int, Any, Any, str | None]


class Entry(msgspec.Struct, frozen=True):
    before: Saga
    fact: Fact
    fields: dict[str, Any]
    logs: list[Log] = []
    events: list[EventType] = []
    retry_in_secs: float | None = None
    deadline_in_secs: float | None = None


ENTRIES: dict[tuple[SagaStatus, type[Fact]], Entry] = {
    (STARTED, Began): Entry(
        saga(), began, {"status": RUNNING, "attempt": 1}, events=[E.SAGA_RUNNING], deadline_in_secs=60.0
    ),
    (STARTED, CancelObserved): Entry(
        saga(),
        CancelObserved(),
        {"status": CANCELLED, "cancel_requested": True, "error_message": "cancelled before it began"},
        events=[E.SAGA_CANCELLED],
    ),
    (RUNNING, StepSucceeded): Entry(
        running(0, 2, outcome_unknown=True),
        succeeded(),
        {"current_step": 1, "attempt": 1, "outcome_unknown": False},
        [(0, EXECUTE, StepStatus.SUCCESS, 2, SENT, GOT, None)],
    ),
    (RUNNING, StepRetried): Entry(
        running(1, 2),
        retried(4.0, unknown=True),
        {"attempt": 3, "outcome_unknown": True, "error_message": "step b: attempt 2 failed: ABORTED: busy"},
        retry_in_secs=4.0,
    ),
    (RUNNING, AllStepsDone): Entry(
        running(3, 1), AllStepsDone(), {"status": COMPLETED, "attempt": 0}, events=[E.SAGA_COMPLETED]
    ),
    (RUNNING, StepFailed): Entry(
        running(2, 3),
        failed("FAILED_PRECONDITION", "card declined"),
        {
            "status": COMPENSATING,
            "attempt": 1,
            "undo_plan": (1, 0),
            "error_message": "step c failed: FAILED_PRECONDITION: card declined",
        },
        [(2, EXECUTE, StepStatus.FAILED, 3, SENT, None, "FAILED_PRECONDITION: card declined")],
        [E.SAGA_COMPENSATING],
    ),
    (RUNNING, DeadlinePassed): Entry(
        running(2, 2),
        DeadlinePassed(cut=cut),
        {
            "status": COMPENSATING,
            "attempt": 1,
            "undo_plan": (1, 0),
            "error_message": "the workflow's deadline of 60 s passed during step c",
        },
        [
            (
                2,
                EXECUTE,
                StepStatus.TIMEOUT,
                2,
                SENT,
                None,
                "the workflow's deadline of 60 s passed while an attempt was running",
            )
        ],
        [E.SAGA_COMPENSATING],
    ),
    (RUNNING, CancelObserved): Entry(
        running(2, 2),
        CancelObserved(cut=cut),
        {
            "status": COMPENSATING,
            "attempt": 1,
            "undo_plan": (1, 0),
            "cancel_requested": True,
            "error_message": "cancelled during step c",
        },
        [(2, EXECUTE, StepStatus.FAILED, 2, SENT, None, "cancelled while an attempt was running")],
        [E.SAGA_COMPENSATING],
    ),
    (COMPENSATING, CompensationSucceeded): Entry(
        compensating(1, 0, attempt=2),
        undone(),
        {"undo_plan": (0,), "attempt": 1},
        [(1, COMPENSATE, StepStatus.SUCCESS, 2, SENT, GOT, None)],
    ),
    (COMPENSATING, CompensationRetried): Entry(
        compensating(1, 0), undo_retried(4.0), {"attempt": 2}, retry_in_secs=4.0
    ),
    (COMPENSATING, CompensationFailed): Entry(
        compensating(1, 0, attempt=5),
        undo_failed("INTERNAL", "broken"),
        {"undo_plan": (0,), "undo_failed": (1,), "compensation_failed": True, "attempt": 1},
        [(1, COMPENSATE, StepStatus.FAILED, 5, SENT, None, "INTERNAL: broken")],
        [E.SAGA_COMPENSATION_FAILED],
    ),
    (COMPENSATING, CompensationSkipped): Entry(
        compensating(1, 0),
        CompensationSkipped(),
        {"undo_plan": (0,)},
        [(1, COMPENSATE, StepStatus.SKIPPED, 0, None, None, None)],
    ),
    (COMPENSATING, CompensationMarkedDone): Entry(
        compensating(1, 0, undo_corrections={1: BY_HAND}),
        CompensationMarkedDone(),
        {"undo_plan": (0,), "undo_corrections": {}},
        [(1, COMPENSATE, StepStatus.SUCCESS, 0, None, None, "done by hand: refunded at the desk")],
    ),
    (COMPENSATING, UndoDone): Entry(compensating(), UndoDone(), {"status": FAILED}, events=[E.SAGA_FAILED]),
    (COMPENSATING, UndoDoneAfterCancel): Entry(
        compensating(cancel_requested=True), UndoDoneAfterCancel(), {"status": CANCELLED}, events=[E.SAGA_CANCELLED]
    ),
    **{
        (status, UndoRetryRequested): Entry(
            saga(status, current_step=3, undo_failed=(2, 0), compensation_failed=True, revision=9),
            UndoRetryRequested(),
            {"status": COMPENSATING, "undo_plan": (2, 0), "undo_failed": (), "attempt": 1},
            events=[E.SAGA_COMPENSATING],
        )
        for status in (FAILED, CANCELLED)
    },
}


def test_the_walk_covers_every_entry_of_the_table() -> None:
    assert set(ENTRIES) == {(status, kind) for status, row in TRANSITIONS.items() for kind in row}


@pytest.mark.parametrize("pair", ENTRIES, ids=lambda pair: f"{pair[0]}-{pair[1].__name__}")
def test_an_entry_writes_exactly_its_fields_logs_and_events(pair: tuple[SagaStatus, type[Fact]]) -> None:
    entry = ENTRIES[pair]
    record = advance(entry.before, workflow(), entry.fact, AT)
    assert changed(entry.before, record.after) == {**entry.fields, "revision": entry.before.revision + 1}
    assert [
        (
            log.step_index,
            log.action,
            log.status,
            log.attempts,
            log.request_payload,
            log.response_payload,
            log.error_message,
        )
        for log in record.logs
    ] == entry.logs
    for log in record.logs:
        assert log.step_name == workflow().steps[log.step_index].name
        assert log.started_at == (BEGAN if log.attempts else AT)
        assert log.completed_at == AT
    assert [event.event_type for event in record.events] == entry.events
    assert [event.current_step for event in record.events] == [record.after.current_step] * len(entry.events)
    assert record.retry_in_secs == entry.retry_in_secs
    assert record.deadline_in_secs == entry.deadline_in_secs
    assert record.release is False
    assert [state.status for state in record.path] == [record.after.status]


# --- what is asked next ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "command"),
    [
        (saga(), Began()),
        (saga(cancel_requested=True), CancelObserved()),
        (running(0, 1), Call(0, EXECUTE, 1)),
        (running(2, 3), Call(2, EXECUTE, 3)),
        (running(2, 3, cancel_requested=True), CancelObserved()),
        (running(3, 1), AllStepsDone()),
        (compensating(1, 0, attempt=2), Call(1, COMPENSATE, 2)),
        (compensating(1, 0, attempt=2, cancel_requested=True), Call(1, COMPENSATE, 2)),
        (compensating(), UndoDone()),
        (compensating(cancel_requested=True), UndoDoneAfterCancel()),
        (saga(COMPLETED), None),
        (saga(FAILED), None),
        (saga(CANCELLED, cancel_requested=True), None),
    ],
)
def test_what_a_saga_needs_is_read_from_its_stored_state(state: Saga, command: Call | Fact | None) -> None:
    assert next_command(state, workflow()) == command


def test_a_step_without_compensation_needs_no_call_to_be_undone() -> None:
    definition = workflow(step("a"), step("b", compensate=None))
    assert next_command(compensating(1, 0), definition) == CompensationSkipped()


# --- moves that follow by themselves ---------------------------------------------------------------------------------


def test_the_last_success_completes_the_saga_in_the_same_record() -> None:
    record = advance(running(2, 1), workflow(), succeeded(), AT)
    assert record.after.status is COMPLETED
    assert record.after.current_step == 3
    assert [state.status for state in record.path] == [RUNNING, COMPLETED]
    assert [event.event_type for event in record.events] == [E.SAGA_COMPLETED]
    assert record.after.revision == record.before.revision + 1


def test_a_first_step_that_fails_leaves_nothing_to_undo_and_fails_the_saga_at_once() -> None:
    record = advance(running(0, 1), workflow(), failed(), AT)
    assert [state.status for state in record.path] == [COMPENSATING, FAILED]
    assert [event.event_type for event in record.events] == [E.SAGA_COMPENSATING, E.SAGA_FAILED]
    assert record.after.attempt == 0


def test_a_success_that_meets_a_cancel_request_is_undone_not_completed() -> None:
    record = advance(running(2, 1, cancel_requested=True), workflow(), succeeded(), AT)
    assert record.after.status is COMPENSATING
    assert record.after.undo_plan == (2, 1, 0)
    assert [log.status for log in record.logs] == [StepStatus.SUCCESS]
    assert record.after.error_message == "cancelled"


def test_a_retry_that_meets_a_cancel_request_is_not_waited_for() -> None:
    record = advance(running(1, 1, cancel_requested=True), workflow(), retried(90.0), AT)
    assert record.after.status is COMPENSATING
    assert record.retry_in_secs is None
    assert [(log.status, log.attempts) for log in record.logs] == [(StepStatus.FAILED, 1)]


def test_steps_without_compensation_are_logged_skipped_and_passed_over() -> None:
    definition = workflow(step("a"), step("b", compensate=None), step("c", compensate=None), step("d"))
    record = advance(running(3, 1), definition, failed(), AT)
    assert [(log.step_name, log.action, log.status) for log in record.logs] == [
        ("d", EXECUTE, StepStatus.FAILED),
        ("c", COMPENSATE, StepStatus.SKIPPED),
        ("b", COMPENSATE, StepStatus.SKIPPED),
    ]
    assert next_command(record.after, definition) == Call(0, COMPENSATE, 1)


def test_a_pause_does_not_outlive_the_move_that_asked_for_it() -> None:
    definition = workflow(step("a"), step("b"))
    waiting = after(running(1, 1), definition, failed(), undo_retried(9.0))
    assert advance(waiting, definition, undone(), AT).retry_in_secs is None


# --- rules of compensation -------------------------------------------------------------------------------------------


def test_compensations_run_from_the_last_succeeded_step_down_to_the_first() -> None:
    definition = workflow()
    state = after(saga(), definition, began, succeeded(), succeeded(), failed())
    asked = []
    while isinstance(call := next_command(state, definition), Call):
        asked.append(call.step_index)
        state = after(state, definition, undone())
    assert asked == [1, 0]
    assert state.status is FAILED


def test_current_step_is_not_lowered_by_compensation() -> None:
    state = after(saga(), workflow(), began, succeeded(), succeeded(), failed(), undone(), undone())
    assert (state.status, state.current_step) == (FAILED, 2)


UNKNOWN_FIRST = workflow(step("a"), step("b", on_unknown=OnUnknown.COMPENSATE))


@pytest.mark.parametrize("on_unknown", OnUnknown)
@pytest.mark.parametrize("is_unknown", [True, False])
def test_the_failed_step_itself_is_undone_first_only_if_unknown_and_asked_for(
    on_unknown: OnUnknown, is_unknown: bool
) -> None:
    definition = workflow(step("a"), step("b", on_unknown=on_unknown))
    record = advance(running(1, 3), definition, failed("UNAVAILABLE", unknown=is_unknown), AT)
    first = (1,) if is_unknown and on_unknown is OnUnknown.COMPENSATE else ()
    assert record.after.undo_plan == (*first, 0)


def test_an_unknown_outcome_of_an_earlier_attempt_is_not_forgotten() -> None:
    state = after(running(1, 1), UNKNOWN_FIRST, retried(unknown=True), retried(unknown=False), failed(unknown=False))
    assert state.undo_plan == (1, 0)


def test_an_unknown_outcome_ends_with_the_success_of_its_step() -> None:
    definition = workflow(step("a"), step("b", on_unknown=OnUnknown.COMPENSATE))
    state = after(running(0, 1), definition, retried(unknown=True), succeeded(), failed(unknown=False))
    assert state.undo_plan == (0,)


@pytest.mark.parametrize("fact", [CancelObserved(cut=cut), DeadlinePassed(cut=cut)])
def test_an_attempt_that_was_cut_off_has_an_unknown_outcome(fact: Fact) -> None:
    assert advance(running(1, 1), UNKNOWN_FIRST, fact, AT).after.undo_plan == (1, 0)


@pytest.mark.parametrize("fact", [CancelObserved(), DeadlinePassed()])
def test_a_step_that_was_never_called_is_not_undone_and_not_logged(fact: Fact) -> None:
    record = advance(running(1, 1), UNKNOWN_FIRST, fact, AT)
    assert record.after.undo_plan == (0,)
    assert record.logs == ()
    assert " during step" not in (record.after.error_message or "")


@pytest.mark.parametrize(
    ("fact", "status"), [(CancelObserved(), StepStatus.FAILED), (DeadlinePassed(), StepStatus.TIMEOUT)]
)
def test_a_step_stopped_between_attempts_is_logged_with_those_it_had(fact: Fact, status: StepStatus) -> None:
    record = advance(running(1, 3), UNKNOWN_FIRST, fact, AT)
    assert [(log.step_name, log.status, log.attempts) for log in record.logs] == [("b", status, 2)]
    assert (record.logs[0].error_message or "").endswith("while waiting to try again")
    assert record.after.undo_plan == (0,)  # its attempts were answered: nothing is unknown


def test_a_step_cut_off_by_a_crash_and_cancelled_before_it_was_asked_again_is_unknown() -> None:
    record = advance(running(1, 1, outcome_unknown=True), UNKNOWN_FIRST, CancelObserved(), AT)
    assert record.after.undo_plan == (1, 0)
    assert [(log.step_name, log.attempts) for log in record.logs] == [("b", 1)]


def test_a_saga_put_aside_before_it_began_has_no_unknown_step() -> None:
    state = after(saga(outcome_unknown=True), UNKNOWN_FIRST, began)
    assert state.outcome_unknown is False
    assert advance(state, UNKNOWN_FIRST, CancelObserved(), AT).logs == ()


@pytest.mark.parametrize(
    ("code", "status"), [("DEADLINE_EXCEEDED", StepStatus.TIMEOUT), ("INTERNAL", StepStatus.FAILED)]
)
def test_a_failure_is_logged_timeout_only_when_the_last_attempt_timed_out(code: str, status: StepStatus) -> None:
    assert advance(running(1, 3), workflow(), failed(code, unknown=True), AT).logs[0].status is status
    assert advance(compensating(1, 0, attempt=5), workflow(), undo_failed(code), AT).logs[0].status is status


def test_a_failed_compensation_does_not_stop_the_ones_before_it() -> None:
    definition = workflow()
    state = after(compensating(1, 0), definition, undo_failed())
    assert next_command(state, definition) == Call(0, COMPENSATE, 1)
    state = after(state, definition, undone())
    assert (state.status, state.compensation_failed, state.undo_failed) == (FAILED, True, (1,))


def test_a_failed_compensation_is_announced_with_its_step_and_cause() -> None:
    record = advance(compensating(0), workflow(), undo_failed("INTERNAL", "broken"), AT)
    assert [(event.event_type, event.status, event.error_message) for event in record.events] == [
        (E.SAGA_COMPENSATION_FAILED, COMPENSATING, "compensation of step a failed: INTERNAL: broken"),
        (E.SAGA_FAILED, FAILED, "step c failed: INTERNAL"),
    ]


def test_a_saga_with_a_failed_compensation_ends_cancelled_if_it_was_cancelled() -> None:
    state = after(compensating(0, cancel_requested=True), workflow(), undo_failed())
    assert (state.status, state.compensation_failed) == (CANCELLED, True)


def test_a_cancel_request_during_compensation_only_changes_the_final_state() -> None:
    definition = workflow()
    asked = [
        next_command(compensating(1, 0, attempt=2, cancel_requested=request), definition) for request in (True, False)
    ]
    assert asked[0] == asked[1]
    cancelled = after(compensating(1, 0, cancel_requested=True), definition, undone(), undone())
    assert cancelled.status is CANCELLED
    assert after(compensating(1, 0), definition, undone(), undone()).status is FAILED


def test_a_cancel_before_the_beginning_ends_the_saga_without_calling_anybody() -> None:
    record = advance(saga(), workflow(), CancelObserved(), AT)
    assert (record.after.status, record.logs, record.after.current_step) == (CANCELLED, (), 0)


# --- an operator runs failed compensations again ---------------------------------------------------------------------


@pytest.mark.parametrize(("requested", "end"), [(False, FAILED), (True, CANCELLED)])
def test_a_successful_second_run_takes_the_flag_back_and_keeps_the_final_state(
    requested: bool, end: SagaStatus
) -> None:
    definition = workflow()
    ended = after(compensating(1, 0, cancel_requested=requested), definition, undo_failed(), undone())
    again = after(ended, definition, UndoRetryRequested())
    assert (again.status, again.undo_plan, again.compensation_failed) == (COMPENSATING, (1,), True)
    over = after(again, definition, undone())
    assert (over.status, over.compensation_failed, over.undo_failed) == (end, False, ())
    assert over.error_message == ended.error_message


def test_a_second_run_that_fails_too_can_be_asked_for_once_more() -> None:
    definition = workflow()
    ended = after(compensating(1, 0), definition, undo_failed(), undone())
    twice = after(ended, definition, UndoRetryRequested(), undo_failed())
    assert (twice.status, twice.compensation_failed, twice.undo_failed) == (FAILED, True, (1,))


def test_corrections_are_kept_until_each_compensation_has_ended() -> None:
    definition = workflow()
    ended = saga(FAILED, current_step=3, undo_failed=(2, 1, 0), compensation_failed=True)
    asked = UndoRetryRequested(corrections={1: CORRECTED, 0: BY_HAND})
    state = advance(ended, definition, asked, AT).after
    assert (state.undo_plan, state.undo_corrections) == ((2, 1, 0), {1: CORRECTED, 0: BY_HAND})
    state = after(state, definition, undo_retried(), undo_failed())
    assert (state.undo_plan, state.undo_corrections) == ((1, 0), {1: CORRECTED, 0: BY_HAND})
    assert next_command(state, definition) == Call(1, COMPENSATE, 1)
    state = after(state, definition, undo_retried())
    assert state.undo_corrections == {1: CORRECTED, 0: BY_HAND}
    record = advance(state, definition, undone(), AT)
    assert [(log.step_index, log.status, log.attempts) for log in record.logs] == [
        (1, StepStatus.SUCCESS, 2),
        (0, StepStatus.SUCCESS, 0),
    ]
    over = record.after
    assert (over.status, over.undo_failed, over.compensation_failed, over.undo_corrections) == (FAILED, (2,), True, {})


@pytest.mark.parametrize("end", [FAILED, CANCELLED])
def test_a_retry_with_everything_done_by_hand_ends_in_the_same_record(end: SagaStatus) -> None:
    before = saga(end, current_step=2, undo_failed=(1, 0), compensation_failed=True, cancel_requested=end is CANCELLED)
    record = advance(before, workflow(), UndoRetryRequested(corrections={0: BY_HAND, 1: BY_HAND}), AT)
    assert [state.status for state in record.path] == [COMPENSATING, end]
    assert [event.event_type for event in record.events] == [E.SAGA_COMPENSATING, ANNOUNCED[end]]
    assert [log.step_index for log in record.logs] == [1, 0]
    assert (record.after.compensation_failed, record.after.undo_failed, record.after.attempt) == (False, (), 0)


def test_the_reason_of_a_corrected_request_stands_in_the_log_however_it_ends() -> None:
    told = UndoCorrection(request=SENT, reason="typo in the receipt")
    state = compensating(1, 0, undo_corrections={1: told})
    (worked,) = advance(state, workflow(), undone(), AT).logs
    assert (worked.request_payload, worked.error_message) == (SENT, "request corrected: typo in the receipt")
    record = advance(state, workflow(), undo_failed("INTERNAL", "broken"), AT)
    assert record.logs[0].error_message == "INTERNAL: broken (request corrected: typo in the receipt)"
    assert record.after.undo_corrections == {}
    assert record.events[0].error_message == "compensation of step b failed: INTERNAL: broken"


def test_a_compensation_that_has_not_failed_cannot_be_corrected() -> None:
    before = saga(FAILED, current_step=2, undo_failed=(1,), compensation_failed=True)
    with pytest.raises(BrokenRule, match="has not failed"):
        advance(before, workflow(), UndoRetryRequested(corrections={0: BY_HAND}), AT)


@pytest.mark.parametrize("status", [FAILED, CANCELLED])
def test_there_is_nothing_to_run_again_where_no_compensation_failed(status: SagaStatus) -> None:
    before = saga(status, current_step=2)
    with pytest.raises(BrokenRule, match="no compensation has failed"):
        advance(before, workflow(), UndoRetryRequested(), AT)


# --- what an attempt means -------------------------------------------------------------------------------------------


def judged(definition: WorkflowDefinition, call: Call, answer: Answer, draw: float = 0.0) -> Fact:
    return judge(definition, call, answer, request=SENT, started_at=BEGAN, draw=draw)


def test_an_answer_that_it_was_done_is_a_success_with_its_response() -> None:
    assert judged(workflow(), Call(1, EXECUTE, 2), done()) == succeeded()
    assert judged(workflow(), Call(1, COMPENSATE, 2), done()) == undone()


@pytest.mark.parametrize("answer", [refused("RESOURCE_EXHAUSTED"), unknown(), unknown("DEADLINE_EXCEEDED")])
def test_a_retryable_answer_is_retried_until_max_attempts_which_counts_the_first(answer: Any) -> None:
    definition = workflow(step("a", retry=patient(3), compensate_retry=patient(2)))
    assert [type(judged(definition, Call(0, EXECUTE, n), answer)) for n in (1, 2, 3)] == [
        StepRetried,
        StepRetried,
        StepFailed,
    ]
    assert [type(judged(definition, Call(0, COMPENSATE, n), answer)) for n in (1, 2)] == [
        CompensationRetried,
        CompensationFailed,
    ]


def test_a_call_that_never_left_is_retried_and_leaves_nothing_unknown() -> None:
    answer = Answer(outcome=Outcome.NOT_DONE, code="ABORTED", message="busy")
    assert judged(workflow(), Call(0, EXECUTE, 1), answer) == retried(1.0, unknown=False)


def test_while_a_step_waits_for_a_retry_the_saga_says_why_and_takes_it_back_when_the_step_succeeds() -> None:
    waiting = advance(running(1, 2), workflow(), retried(4.0), AT).after
    assert waiting.error_message == "step b: attempt 2 failed: ABORTED: busy"
    assert advance(waiting, workflow(), succeeded(), AT).after.error_message is None


def test_a_cancel_in_the_pause_keeps_what_the_participant_said_and_when_the_action_began() -> None:
    waiting = advance(running(1, 2), workflow(), retried(4.0), AT).after
    (log,) = advance(waiting, workflow(), CancelObserved(began_at=BEGAN), AT).logs
    assert log.started_at == BEGAN
    assert log.error_message == ("cancelled while waiting to try again; step b: attempt 2 failed: ABORTED: busy")


def test_a_cancel_that_was_there_before_the_retry_knows_when_the_action_began() -> None:
    asked = msgspec.structs.replace(running(1, 2), cancel_requested=True)
    (log,) = advance(asked, workflow(), retried(4.0), AT).logs
    assert log.started_at == BEGAN


@pytest.mark.parametrize(("answer", "is_unknown"), [(unknown(), True), (refused("ABORTED"), False)])
def test_only_an_unknown_outcome_is_remembered_as_unknown(answer: Any, is_unknown: bool) -> None:
    first = judged(workflow(), Call(0, EXECUTE, 1), answer)
    last = judged(workflow(), Call(0, EXECUTE, 3), answer)
    assert isinstance(first, StepRetried)
    assert isinstance(last, StepFailed)
    assert (first.unknown, last.unknown) == (is_unknown, is_unknown)


def test_each_policy_has_its_own_non_retryable_codes() -> None:
    definition = workflow(step("a", retry=patient(non_retryable=frozenset({"ABORTED"})), compensate_retry=patient(5)))
    assert isinstance(judged(definition, Call(0, EXECUTE, 1), refused("ABORTED")), StepFailed)
    assert isinstance(judged(definition, Call(0, COMPENSATE, 1), refused("ABORTED")), CompensationRetried)
    assert isinstance(judged(definition, Call(0, EXECUTE, 1), refused("NOT_FOUND")), StepRetried)
    assert isinstance(judged(definition, Call(0, COMPENSATE, 1), refused("NOT_FOUND")), CompensationFailed)


def test_a_permanent_answer_is_not_retried_whatever_the_policy_says() -> None:
    answer = Answer(outcome=Outcome.NOT_DONE, code="INTERNAL", message="cannot be built", permanent=True)
    assert isinstance(judged(workflow(), Call(0, EXECUTE, 1), answer), StepFailed)
    assert isinstance(judged(workflow(), Call(0, COMPENSATE, 1), answer), CompensationFailed)


def test_the_pause_a_participant_asks_for_replaces_the_computed_delay() -> None:
    fact = judged(workflow(), Call(0, EXECUTE, 1), refused("UNAVAILABLE", retry_after_secs=17.5))
    assert isinstance(fact, StepRetried)
    assert fact.delay_secs == 17.5
    none_at_all = judged(workflow(), Call(0, EXECUTE, 1), refused("UNAVAILABLE", retry_after_secs=0.0))
    assert isinstance(none_at_all, StepRetried)
    assert none_at_all.delay_secs == 0.0
    undo = judged(workflow(), Call(0, COMPENSATE, 1), refused("UNAVAILABLE", retry_after_secs=17.5))
    assert isinstance(undo, CompensationRetried)
    assert undo.delay_secs == 17.5


def test_the_pause_a_participant_asks_for_does_not_overrule_a_code_that_is_final() -> None:
    answer = refused("NOT_FOUND", retry_after_secs=1.0)
    assert isinstance(judged(workflow(), Call(0, EXECUTE, 1), answer), StepFailed)


def test_no_pause_is_longer_than_a_date_can_tell() -> None:
    endless = patient(3, initial_interval_ms=10**30)
    for answer in (refused("UNAVAILABLE", retry_after_secs=315_576_000_000.0), refused("UNAVAILABLE")):
        fact = judged(workflow(step("a", retry=endless)), Call(0, EXECUTE, 1), answer)
        assert isinstance(fact, StepRetried)
        assert fact.delay_secs == transitions.LONGEST_PAUSE_SECS


def test_the_draw_spreads_the_delay() -> None:
    definition = workflow(step("a", retry=patient(jitter=0.5)))
    low, high = (judged(definition, Call(0, EXECUTE, 1), unknown(), draw) for draw in (0.0, 0.9999))
    assert isinstance(low, StepRetried)
    assert isinstance(high, StepRetried)
    assert low.delay_secs == 0.5
    assert 0.99 < high.delay_secs < 1.0


@pytest.mark.parametrize(("message", "told"), [("card declined", "ABORTED: card declined"), ("", "ABORTED")])
def test_the_error_message_names_the_step_and_the_cause(message: str, told: str) -> None:
    record = advance(running(1, 1), workflow(), failed("ABORTED", message), AT)
    assert record.after.error_message == f"step b failed: {told}"
    assert record.logs[0].error_message == told
    assert record.events[0].error_message == f"step b failed: {told}"


# --- a whole life, event by event ------------------------------------------------------------------------------------


def test_each_move_is_announced_once_and_a_stay_is_not() -> None:
    definition = workflow()
    state = saga()
    told: list[EventType] = []
    for fact in (began, succeeded(), retried(), succeeded(), failed(), undo_retried(), undo_failed(), undone()):
        record = advance(state, definition, fact, AT)
        told += [event.event_type for event in record.events]
        state = record.after
    assert told == [E.SAGA_RUNNING, E.SAGA_COMPENSATING, E.SAGA_COMPENSATION_FAILED, E.SAGA_FAILED]


def test_a_workflow_without_a_timeout_sets_no_deadline() -> None:
    assert advance(saga(), workflow(timeout_secs=None), began, AT).deadline_in_secs is None
