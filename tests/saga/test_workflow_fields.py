"""Every row of the field table (spec section 1): what is accepted, the default, what is refused and how it is said."""

from __future__ import annotations

from typing import Any

import pytest

from saga.errors import WorkflowInvalid
from saga.workflow import DEFAULT_NON_RETRYABLE, STATUS_CODES, Backoff, OnUnknown, RetryPolicy, Step
from saga.workflow_yaml import MAX_STEPS, parse_workflow

STEP = "{name: a, service: s, method: A.B}"


def step_of(fields: str) -> Step:
    """The one step of a workflow, which has these fields besides the required ones."""
    text = f"name: w\nsteps:\n  - name: a\n    service: s\n    method: A.B\n    {fields}\n"
    return parse_workflow(text).steps[0]


def errors_of(text: str) -> list[str]:
    with pytest.raises(WorkflowInvalid) as caught:
        parse_workflow(text)
    return [f"{detail.field}: {detail.message}" for detail in caught.value.details]


def step_errors(fields: str) -> list[str]:
    return errors_of(f"name: w\nsteps:\n  - name: a\n    service: s\n    method: A.B\n    {fields}\n")


# --- name ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "x" * 255, "注文" * 100, "'yes'", '"1"', "order-fulfillment", "a b/c"])
def test_name_is_a_string_of_1_to_255_characters(name: str) -> None:
    assert parse_workflow(f"name: {name}\nsteps: [{STEP}]").name == name.strip("'\"")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("''", "name: expected string of 1 to 255 characters, got 0"),
        ("x" * 256, "name: expected string of 1 to 255 characters, got 256"),
        ("", "name: expected string of 1 to 255 characters, got null"),
        ("12", "name: expected string of 1 to 255 characters, got 12; put it in quotes"),
        ("true", "name: expected string of 1 to 255 characters, got true; put it in quotes"),
        ("[a]", "name: expected string of 1 to 255 characters, got a list"),
        ("{a: b}", "name: expected string of 1 to 255 characters, got a map"),
        ('"a\\0b"', "name: expected string of 1 to 255 characters, got control characters in it"),
        ('"a\\nb"', "name: expected string of 1 to 255 characters, got control characters in it"),
        ('"a\\u202eb"', "name: expected string of 1 to 255 characters, got characters in it that do not print"),
        ('"a\\_b"', "name: expected string of 1 to 255 characters, got characters in it that do not print"),
        (
            "yes",
            "name: expected string of 1 to 255 characters, got yes, a boolean to some YAML readers and a string to "
            "others; put it in quotes",
        ),
        (
            "2024-01-01",
            "name: expected string of 1 to 255 characters, got 2024-01-01, a date to some YAML readers and a string to "
            "others; put it in quotes",
        ),
    ],
)
def test_name_of_another_kind_is_refused(value: str, message: str) -> None:
    assert errors_of(f"name: {value}\nsteps: [{STEP}]") == [message]


def test_name_is_required() -> None:
    assert errors_of(f"steps: [{STEP}]") == ["name: is required"]


# --- timeout_secs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "secs"),
    [("timeout_secs: 90", 90.0), ("timeout_secs: 0.5", 0.5), ("timeout_secs: 1e3", 1000.0), ("", None)],
)
def test_timeout_secs_is_a_number_above_0_and_none_by_default(text: str, secs: float | None) -> None:
    assert parse_workflow(f"name: w\n{text}\nsteps: [{STEP}]").timeout_secs == secs


NOT_A_TIMEOUT = [
    ("0", "expected number > 0, got 0"),
    ("-1", "expected number > 0, got -1"),
    ("'5'", "expected number > 0, got the string '5'"),
    ("true", "expected number > 0, got true"),
    (".inf", "expected number > 0, got .inf, which is not finite or too large"),
    (".nan", "expected number > 0, got .nan, which is not finite or too large"),
    ("1e999", "expected number > 0, got 1e999, which is not finite or too large"),
    ("1:30", "expected number > 0, got 1:30, which is not a plain decimal number"),
    ("1_000", "expected number > 0, got 1_000, which is not a plain decimal number"),
    ("0x10", "expected number > 0, got 0x10, which is not a plain decimal number"),
    ("010", "expected number > 0, got 010, which is not a plain decimal number"),
    ("08", "expected number > 0, got 08, which is not a plain decimal number"),
    ("0o17", "expected number > 0, got 0o17, which is not a plain decimal number"),
    ("400000000", "expected number > 0 and <= 315360000, got 400000000"),
    ("[1]", "expected number > 0, got a list"),
]


@pytest.mark.parametrize(("value", "message"), NOT_A_TIMEOUT)
def test_timeout_secs_that_is_no_duration_is_refused(value: str, message: str) -> None:
    assert errors_of(f"name: w\ntimeout_secs: {value}\nsteps: [{STEP}]") == [f"timeout_secs: {message}"]


def test_timeout_secs_with_more_digits_than_python_reads_is_refused() -> None:
    assert len(errors_of(f"name: w\ntimeout_secs: {'9' * 10_000}\nsteps: [{STEP}]")) == 1


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_run_in_the_order_they_are_written() -> None:
    text = "name: w\nsteps:\n" + "".join(f"- {{name: s{n}, service: s, method: A.B}}\n" for n in (3, 1, 2))
    assert [step.name for step in parse_workflow(text).steps] == ["s3", "s1", "s2"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "steps: expected a list of 1 to 1000 steps, got 0"),
        ("{a: 1}", "steps: expected a list of 1 or more steps, got a map"),
        ("", "steps: expected a list of 1 or more steps, got null"),
        ("[a]", "steps[0]: expected a map, got a string"),
        ("[[]]", "steps[0]: expected a map, got a list"),
        ("[null]", "steps[0]: expected a map, got null"),
    ],
)
def test_steps_of_another_kind_are_refused(value: str, message: str) -> None:
    assert errors_of(f"name: w\nsteps: {value}") == [message]


def test_steps_are_required() -> None:
    assert errors_of("name: w") == ["steps: is required"]


def test_as_many_steps_as_documented_are_accepted_and_no_more() -> None:
    lines = [f"- {{name: s{n}, service: s, method: A.B}}\n" for n in range(MAX_STEPS + 1)]
    assert len(parse_workflow("name: w\nsteps:\n" + "".join(lines[:-1])).steps) == MAX_STEPS
    assert errors_of("name: w\nsteps:\n" + "".join(lines)) == ["steps: expected a list of 1 to 1000 steps, got 1001"]


@pytest.mark.parametrize("key", ["name", "service", "method"])
def test_a_step_needs_its_name_service_and_method(key: str) -> None:
    fields = {"name": "a", "service": "s", "method": "A.B"}
    del fields[key]
    inner = ", ".join(f"{name}: {value}" for name, value in fields.items())
    assert errors_of(f"name: w\nsteps: [{{{inner}}}]") == [f"steps[0].{key}: is required"]


@pytest.mark.parametrize("key", ["name", "service"])
@pytest.mark.parametrize(("value", "got"), [("''", "0"), ("x" * 256, "256"), ('"a\\0"', "control characters in it")])
def test_a_step_name_and_a_service_have_1_to_255_characters(key: str, value: str, got: str) -> None:
    fields = {"name": "a", "service": "s", "method": "A.B", key: value}
    inner = ", ".join(f"{name}: {value}" for name, value in fields.items())
    expected = f"steps[0].{key}: expected string of 1 to 255 characters, got {got}"
    assert errors_of(f"name: w\nsteps: [{{{inner}}}]") == [expected]


def test_a_step_name_must_be_unique_within_the_workflow() -> None:
    text = "name: w\nsteps: [{name: a, service: s, method: A.B}, {name: a, service: s, method: A.B}]"
    assert errors_of(text) == ["steps[1].name: duplicate step name 'a', steps[0] has it"]


def test_a_service_that_is_not_configured_is_refused_when_the_services_are_known() -> None:
    text = f"name: w\nsteps: [{STEP}]"
    assert parse_workflow(text, ["s", "t"]).steps[0].service == "s"
    for services, known in ((["t", "r"], "r, t"), ([], "none, the configuration has no services")):
        with pytest.raises(WorkflowInvalid) as caught:
            parse_workflow(text, services)
        (detail,) = caught.value.details
        assert (detail.field, detail.reason) == ("steps[0].service", "unknown_service")
        assert detail.message == f"unknown service s; known: {known}"


@pytest.mark.parametrize("key", ["method", "compensate"])
@pytest.mark.parametrize("method", ["A.B", "pkg.A.B", "k1s0.system.v1.Orders_2.Do_it"])
def test_a_method_is_service_dot_method_with_or_without_a_package(key: str, method: str) -> None:
    text = f"name: w\nsteps: [{{name: a, service: s, method: A.B, compensate: C.D, {key}: {method}}}]"
    text = text.replace("method: A.B, " if key == "method" else "compensate: C.D, ", "", 1)
    assert getattr(parse_workflow(text).steps[0], key) == method


@pytest.mark.parametrize("method", ["A", "A.", ".B", "A..B", "A.1B", "A/B", "/a.A/B", "A.B C", "Ä.B", "A-b.C"])
def test_a_method_of_another_form_is_refused(method: str) -> None:
    expected = f"expected Service.Method or package.Service.Method, got the string '{method}'"
    assert step_errors(f"compensate: {method}") == [f"steps[0].compensate: {expected}"]
    assert errors_of(f"name: w\nsteps: [{{name: a, service: s, method: {method}}}]") == [f"steps[0].method: {expected}"]


def test_compensate_is_none_by_default() -> None:
    assert step_of("").compensate is None
    assert step_of("compensate: null").compensate is None


def test_a_step_times_out_after_30_seconds_by_default() -> None:
    assert step_of("").timeout_secs == 30.0
    assert step_of("timeout_secs: 0.25").timeout_secs == 0.25


@pytest.mark.parametrize(("value", "message"), NOT_A_TIMEOUT)
def test_a_step_timeout_that_is_no_duration_is_refused(value: str, message: str) -> None:
    assert step_errors(f"timeout_secs: {value}") == [f"steps[0].timeout_secs: {message}"]


# --- retry -----------------------------------------------------------------------------------------------------------


def test_retry_has_the_documented_defaults() -> None:
    expected = RetryPolicy(
        max_attempts=3,
        backoff=Backoff.EXPONENTIAL,
        initial_interval_ms=1000,
        max_interval_ms=None,
        jitter=0.0,
        non_retryable=DEFAULT_NON_RETRYABLE,
    )
    assert step_of("").retry == step_of("retry: {}").retry == step_of("retry:").retry == expected
    assert {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "FAILED_PRECONDITION",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
    } == DEFAULT_NON_RETRYABLE


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("max_attempts", "1", 1),
        ("max_attempts", "2147483647", 2147483647),
        ("backoff", "exponential", Backoff.EXPONENTIAL),
        ("backoff", "linear", Backoff.LINEAR),
        ("backoff", "constant", Backoff.CONSTANT),
        ("initial_interval_ms", "0", 0),
        ("initial_interval_ms", "250", 250),
        ("max_interval_ms", "0", 0),
        ("max_interval_ms", "60000", 60000),
        ("max_interval_ms", "null", None),
        ("jitter", "0", 0.0),
        ("jitter", "0.5", 0.5),
        ("jitter", "1.0", 1.0),
        ("non_retryable", "[]", frozenset()),
        ("non_retryable", "[ABORTED, DATA_LOSS]", frozenset({"ABORTED", "DATA_LOSS"})),
    ],
)
@pytest.mark.parametrize("key", ["retry", "compensate_retry"])
def test_each_field_of_retry_is_read(key: str, field: str, value: str, read: Any) -> None:
    assert getattr(getattr(step_of(f"{key}: {{{field}: {value}}}"), key), field) == read


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_attempts", "0", "expected int >= 1, got 0"),
        ("max_attempts", "-3", "expected int >= 1, got -3"),
        ("max_attempts", "1.0", "expected int >= 1, got 1.0"),
        ("max_attempts", "true", "expected int >= 1, got true"),
        ("max_attempts", "'3'", "expected int >= 1, got the string '3'"),
        ("max_attempts", "1_0", "expected int >= 1, got 1_0, which is not a plain decimal number"),
        ("max_attempts", "2147483648", "expected int from 1 to 2147483647, got 2147483648"),
        ("backoff", "fibonacci", "expected exponential or linear or constant, got the string 'fibonacci'"),
        ("backoff", "2", "expected exponential or linear or constant, got 2"),
        ("initial_interval_ms", "-1", "expected int >= 0, got -1"),
        ("initial_interval_ms", "1.5", "expected int >= 0, got 1.5"),
        ("max_interval_ms", "-1", "expected int >= 0, got -1"),
        ("max_interval_ms", "false", "expected int >= 0, got false"),
        ("jitter", "1.01", "expected number from 0 to 1, got 1.01"),
        ("jitter", "-0.1", "expected number from 0 to 1, got -0.1"),
        ("jitter", "lots", "expected number from 0 to 1, got the string 'lots'"),
        ("non_retryable", "ABORTED", "expected a list, got the string 'ABORTED'"),
    ],
)
@pytest.mark.parametrize("key", ["retry", "compensate_retry"])
def test_each_field_of_retry_is_refused_outside_its_range(key: str, field: str, value: str, message: str) -> None:
    assert step_errors(f"{key}: {{{field}: {value}}}") == [f"steps[0].{key}.{field}: {message}"]


def test_every_code_a_call_can_fail_with_may_be_non_retryable_and_nothing_else() -> None:
    codes = ", ".join(STATUS_CODES)
    assert step_of(f"retry: {{non_retryable: [{codes}]}}").retry.non_retryable == frozenset(STATUS_CODES)
    for wrong in ("OK", "aborted", "3", "null", "[ABORTED]"):
        (error,) = step_errors(f"retry: {{non_retryable: [ABORTED, {wrong}]}}")
        assert error.startswith("steps[0].retry.non_retryable[1]: expected one of CANCELLED UNKNOWN INVALID_ARGUMENT ")


def test_a_compensation_is_tried_5_times_and_else_as_the_step() -> None:
    assert step_of("").compensate_retry == RetryPolicy(max_attempts=5)
    step = step_of("retry: {max_attempts: 2, initial_interval_ms: 7, backoff: linear}")
    assert step.compensate_retry == RetryPolicy(max_attempts=5, initial_interval_ms=7, backoff=Backoff.LINEAR)
    step = step_of("retry: {initial_interval_ms: 7}\n    compensate_retry: {max_attempts: 9, jitter: 1}")
    assert step.compensate_retry == RetryPolicy(max_attempts=9, initial_interval_ms=7, jitter=1.0)


def test_retry_of_another_kind_is_refused() -> None:
    assert step_errors("retry: 3") == ["steps[0].retry: expected a map, got 3"]


# --- on_unknown, input -----------------------------------------------------------------------------------------------


def test_on_unknown_is_skip_or_compensate_and_skip_by_default() -> None:
    assert step_of("").on_unknown is OnUnknown.SKIP
    assert step_of("on_unknown: skip").on_unknown is OnUnknown.SKIP
    assert step_of("on_unknown: compensate").on_unknown is OnUnknown.COMPENSATE
    expected = "steps[0].on_unknown: expected skip or compensate, got the string 'maybe'"
    assert step_errors("on_unknown: maybe") == [expected]


@pytest.mark.parametrize("key", ["input", "compensate_input"])
@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("payload.order", "payload.order"),
        ("{}", {}),
        (
            "{id: payload.id, items: ['payload.a', {b: payload.b}]}",
            {"id": "payload.id", "items": ["payload.a", {"b": "payload.b"}]},
        ),
        ("{n: 3, f: 0.5, t: true, z: null}", {"n": 3, "f": 0.5, "t": True, "z": None}),
        ("{literal: \"'EUR'\"}", {"literal": "'EUR'"}),
        ("", None),
    ],
)
def test_input_is_a_map_or_an_expression_and_the_payload_by_default(key: str, value: str, read: Any) -> None:
    step = step_of(f"{key}: {value}")
    assert getattr(step, key) == read
    assert (step_of("").input, step_of("").compensate_input) == (None, None)


@pytest.mark.parametrize(
    ("value", "place", "message"),
    [
        ("[payload]", "", "expected a map or an expression, got a list"),
        ("3", "", "expected a map or an expression, got 3"),
        ("true", "", "expected a map or an expression, got true"),
        ("''", "", "expected a JMESPath expression: the expression is empty; the empty string is written ''"),
        (
            "payload.[",
            "",
            "expected a JMESPath expression: the expression ends too early (at character 10 of the expression)",
        ),
        (
            "{items: [payload.a, payload.b, 'payload.c ==']}",
            ".items[2]",
            "expected a JMESPath expression: the expression ends too early (at character 13 of the expression)",
        ),
        ("{a: nope(payload)}", ".a", "expected a JMESPath expression: unknown function nope; known: abs, avg,"),
        ("{a: 'length(payload, payload)'}", ".a", "expected a JMESPath expression: length takes 1 argument(s), got 2"),
        (
            "{currency: EUR}",
            ".currency",
            "unknown name EUR: an expression starts from saga, payload, steps; a literal string is written \"'EUR'\"",
        ),
        ("{a: steps.later.response}", ".a", "unknown name steps.later: no such step"),
        ("{a: saga.id}", ".a", "unknown name saga.id; known: saga_id, workflow_name,"),
        (
            "{a: yes}",
            ".a",
            "expected an expression, a number, true, false or null, got yes, a boolean to some YAML readers",
        ),
        ("{a: .inf}", ".a", "expected an expression, a number, true, false or null, got .inf, which is not finite"),
        ("{a: 18446744073709551616}", ".a", "expected a number of at most 64 bits; write a larger one as a string"),
        ("{1: payload}", "", "expected a string as key, got 1"),
        ("{yes: payload}", "", "expected a string as key, got yes, a boolean"),
        ('{"a\\0": payload}', '."a\\u0000"', "a key cannot hold a NUL"),
    ],
)
@pytest.mark.parametrize("key", ["input", "compensate_input"])
def test_a_bad_input_is_refused_with_the_path_of_the_place(key: str, value: str, place: str, message: str) -> None:
    (error,) = step_errors(f"{key}: {value}")
    assert error.startswith(f"steps[0].{key}{place}: {message}")


def test_an_input_sees_the_steps_before_it_and_a_compensation_sees_all() -> None:
    text = """
name: w
steps:
  - {name: a, service: s, method: A.B, compensate_input: {x: steps.b.response}, input: {x: 1}}
  - {name: b, service: s, method: A.B, input: {x: steps.a.response.id, y: 'steps."a".response'}}
  - {name: c-d, service: s, method: A.B, input: {x: 'steps.[a, b].response'}}
"""
    assert errors_of(text.replace("'steps.[a, b].response'", "steps.c-d.response"))[0].startswith(
        "steps[2].input.x: expected a JMESPath expression: Unknown token '-'; a name with other characters"
    )
    assert len(parse_workflow(text).steps) == 3
    assert errors_of(text.replace("steps.a.response.id", "steps.b.response")) == [
        "steps[1].input.x: unknown name steps.b: no such step comes before this one"
    ]
    assert errors_of(text.replace("steps.a.response.id", "steps.a.id")) == [
        "steps[1].input.x: unknown name steps.a.id; known: response"
    ]
