"""The words of the domain and their frozen values, and the definitions a saga runs by."""

from __future__ import annotations

import msgspec
import pytest

from saga.model import TERMINAL, EventType, LogEntry, SagaStatus, StepAction, StepLog, StepStatus
from saga.transitions import advance
from saga.workflow import (
    Backoff,
    OnUnknown,
    RetryPolicy,
    Step,
    WorkflowDefinition,
    decode_definition,
    encode_definition,
)
from tests.saga.samples import (
    AT,
    BEGAN,
    GOT,
    SENT,
    compensating,
    failed,
    patient,
    running,
    saga,
    step,
    succeeded,
    undo_failed,
    undone,
    workflow,
)

# --- saga state ------------------------------------------------------------------------------------------------------


def test_the_states_are_those_of_the_contract() -> None:
    assert [str(status) for status in SagaStatus] == [
        "STARTED",
        "RUNNING",
        "COMPENSATING",
        "COMPLETED",
        "FAILED",
        "CANCELLED",
    ]


@pytest.mark.parametrize("status", SagaStatus)
def test_three_states_are_final_and_three_are_not(status: SagaStatus) -> None:
    assert status.is_terminal is (status in TERMINAL) is (str(status) in {"COMPLETED", "FAILED", "CANCELLED"})


@pytest.mark.parametrize("status", SagaStatus)
def test_a_status_survives_the_way_through_text(status: SagaStatus) -> None:
    assert SagaStatus(str(status)) is status
    assert msgspec.json.decode(msgspec.json.encode(status), type=SagaStatus) is status


@pytest.mark.parametrize("text", ["started", "DONE", "", "RUNNING "])
def test_a_word_that_is_no_status_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid SagaStatus"):
        SagaStatus(text)


def test_a_new_saga_has_begun_nothing() -> None:
    new = saga()
    assert (new.status, new.current_step, new.attempt, new.undo_plan, new.undo_failed) == (
        SagaStatus.STARTED,
        0,
        0,
        (),
        (),
    )
    assert (new.error_message, new.compensation_failed, new.cancel_requested) == (None, False, False)


def test_a_saga_is_frozen() -> None:
    with pytest.raises(AttributeError):
        saga().status = SagaStatus.COMPLETED  # type: ignore[misc]  # the very thing that must not work


def test_a_saga_survives_the_way_through_json() -> None:
    state = compensating(1, 0, undo_failed=(2,), cancel_requested=True, traceparent="00-x-y-01")
    assert msgspec.json.decode(msgspec.json.encode(state), type=type(state)) == state


def test_the_other_words_are_those_of_the_contract() -> None:
    assert [str(word) for word in StepAction] == ["EXECUTE", "COMPENSATE"]
    assert [str(word) for word in StepStatus] == ["SUCCESS", "FAILED", "TIMEOUT", "SKIPPED"]
    assert [str(word) for word in EventType] == [
        "SAGA_STARTED",
        "SAGA_RUNNING",
        "SAGA_COMPLETED",
        "SAGA_COMPENSATING",
        "SAGA_FAILED",
        "SAGA_CANCELLED",
        "SAGA_COMPENSATION_FAILED",
    ]


# --- step log --------------------------------------------------------------------------------------------------------


def only_log(*records: LogEntry) -> LogEntry:
    (log,) = records
    return log


def test_a_success_is_logged_with_both_payloads_and_both_instants() -> None:
    log = only_log(*advance(running(1, 2), workflow(), succeeded(), AT).logs)
    assert log == LogEntry(
        step_index=1,
        step_name="b",
        action=StepAction.EXECUTE,
        status=StepStatus.SUCCESS,
        started_at=BEGAN,
        completed_at=AT,
        attempts=2,
        request_payload=SENT,
        response_payload=GOT,
    )


def test_a_failure_is_logged_with_its_cause_and_without_a_response() -> None:
    log = only_log(*advance(running(1, 3), workflow(), failed("ABORTED", "busy"), AT).logs)
    assert (log.status, log.error_message, log.response_payload) == (StepStatus.FAILED, "ABORTED: busy", None)
    assert (log.started_at, log.completed_at, log.attempts) == (BEGAN, AT, 3)


def test_a_timeout_is_logged_as_such() -> None:
    log = only_log(*advance(running(1, 3), workflow(), failed("DEADLINE_EXCEEDED", unknown=True), AT).logs)
    assert (log.status, log.error_message) == (StepStatus.TIMEOUT, "DEADLINE_EXCEEDED: no")


def test_a_compensation_is_logged_under_its_own_action() -> None:
    log = only_log(*advance(compensating(1, 0), workflow(), undone(), AT).logs)
    assert (log.action, log.status, log.step_name) == (StepAction.COMPENSATE, StepStatus.SUCCESS, "b")


def test_a_failed_compensation_is_logged_with_its_attempts() -> None:
    log = only_log(*advance(compensating(1, 0, attempt=5), workflow(), undo_failed("INTERNAL", "x"), AT).logs)
    assert (log.action, log.status, log.attempts, log.error_message) == (
        StepAction.COMPENSATE,
        StepStatus.FAILED,
        5,
        "INTERNAL: x",
    )


def test_a_skipped_compensation_is_logged_at_the_instant_of_the_move_and_without_attempts() -> None:
    definition = workflow(step("a", compensate=None), step("b"))
    execute, skipped = advance(running(1, 1), definition, failed(), AT).logs
    assert execute.action is StepAction.EXECUTE
    assert (skipped.status, skipped.attempts, skipped.started_at, skipped.completed_at) == (
        StepStatus.SKIPPED,
        0,
        AT,
        AT,
    )
    assert (skipped.request_payload, skipped.response_payload, skipped.error_message) == (None, None, None)


def test_a_stored_log_is_an_entry_with_an_id() -> None:
    entry, stored = (set(kind.__struct_fields__) for kind in (LogEntry, StepLog))
    assert stored - entry == {"id", "saga_id"}
    assert entry <= stored


# --- definitions -----------------------------------------------------------------------------------------------------


def test_a_step_has_the_defaults_of_the_table() -> None:
    plain = Step(name="a", service="svc", method="Svc.A")
    assert (plain.compensate, plain.timeout_secs, plain.on_unknown) == (None, 30.0, OnUnknown.SKIP)
    assert (plain.retry.max_attempts, plain.compensate_retry.max_attempts) == (3, 5)
    assert (plain.input, plain.compensate_input) == (None, None)
    assert WorkflowDefinition(name="w", steps=(plain,)).timeout_secs is None


def test_an_action_has_its_own_method_and_policy() -> None:
    both = step("a", retry=patient(2), compensate_retry=patient(9))
    assert (both.method_of(StepAction.EXECUTE), both.method_of(StepAction.COMPENSATE)) == ("Svc.A", "Svc.UndoA")
    assert (both.policy(StepAction.EXECUTE).max_attempts, both.policy(StepAction.COMPENSATE).max_attempts) == (2, 9)


def test_equal_definitions_give_equal_texts_and_come_back_whole() -> None:
    definition = workflow(
        step(
            "a",
            input={"b": "payload.b", "a": "payload.a"},
            retry=RetryPolicy(backoff=Backoff.LINEAR, non_retryable=frozenset({"ABORTED", "INTERNAL", "UNKNOWN"})),
            on_unknown=OnUnknown.COMPENSATE,
        )
    )
    turned = workflow(
        step(
            "a",
            input={"a": "payload.a", "b": "payload.b"},
            retry=RetryPolicy(backoff=Backoff.LINEAR, non_retryable=frozenset({"UNKNOWN", "ABORTED", "INTERNAL"})),
            on_unknown=OnUnknown.COMPENSATE,
        )
    )
    assert encode_definition(definition) == encode_definition(turned)
    assert decode_definition(encode_definition(definition)) == definition


def test_a_definition_that_differs_gives_another_text() -> None:
    assert encode_definition(workflow(timeout_secs=60)) != encode_definition(workflow(timeout_secs=61))
