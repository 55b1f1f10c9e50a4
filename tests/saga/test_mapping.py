"""Requests built from the payload and the responses of earlier steps."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jmespath.functions import Functions

from saga.errors import MappingFailed
from saga.expressions import (
    MAX_EXPRESSION_CHARS,
    BadExpression,
    Budget,
    EvaluationFailed,
    Expression,
    check_json,
    compile_expression,
)
from saga.mapping import build_request
from saga.model import Json, Saga, SagaStatus, StepAction
from saga.workflow import Step

PAYLOAD: Json = {
    "order_id": "A-1",
    "total": 12.5,
    "gift": False,
    "items": [{"sku": "lamp", "quantity": 2}, {"sku": "bulb", "quantity": 4}],
}
RESPONSES: dict[str, Json] = {"reserve": {"reservation_id": "R-1"}, "charge-card": {"id": "C-9", "lines": [1, 2]}}


def saga_with(payload: Json) -> Saga:
    instant = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=9)))
    return Saga(
        saga_id="5d0bbd34-4f3a-4f4a-9c6f-1d7f1f3f9a01",
        workflow_name="order",
        workflow_version=3,
        status=SagaStatus.RUNNING,
        payload=payload,
        created_at=instant,
        updated_at=instant,
        correlation_id="corr-1",
        initiated_by="shop",
    )


SAGA = saga_with(PAYLOAD)


def built(template: Any, saga: Saga = SAGA) -> Any:
    step = Step(name="s", service="s", method="A.B", input=template)
    request, strict = build_request(step, StepAction.EXECUTE, saga, RESPONSES)
    assert strict
    return request


def failure(template: Any, saga: Saga = SAGA) -> MappingFailed:
    step = Step(name="s", service="s", method="A.B", input=template)
    with pytest.raises(MappingFailed) as caught:
        build_request(step, StepAction.EXECUTE, saga, RESPONSES)
    return caught.value


def test_without_an_input_the_request_is_the_payload_itself_and_not_strict() -> None:
    step = Step(name="s", service="s", method="A.B", compensate="A.C")
    for action in StepAction:
        request, strict = build_request(step, action, SAGA, RESPONSES)
        assert request is SAGA.payload
        assert not strict


def test_each_action_has_an_input_of_its_own() -> None:
    step = Step(
        name="s", service="s", method="A.B", compensate="A.C", compensate_input={"id": "steps.reserve.response"}
    )
    assert build_request(step, StepAction.EXECUTE, SAGA, RESPONSES) == (PAYLOAD, False)
    assert build_request(step, StepAction.COMPENSATE, SAGA, RESPONSES) == ({"id": {"reservation_id": "R-1"}}, True)


def test_a_map_is_built_leaf_by_leaf() -> None:
    template = {
        "order": "payload.order_id",
        "reservation": "steps.reserve.response.reservation_id",
        "charge": 'steps."charge-card".response.id',
        "lines": ["payload.items[0].sku", {"count": "length(payload.items)"}],
        "skus": "payload.items[*].sku",
        "literals": [1, 2.5, True, None, "'EUR'", '`{"a": [1]}`'],
        "missing": "payload.nowhere.at.all",
        "empty": {},
    }
    assert built(template) == {
        "order": "A-1",
        "reservation": "R-1",
        "charge": "C-9",
        "lines": ["lamp", {"count": 2}],
        "skus": ["lamp", "bulb"],
        "literals": [1, 2.5, True, None, "EUR", {"a": [1]}],
        "missing": None,
        "empty": {},
    }


def test_an_expression_alone_gives_the_whole_request() -> None:
    assert built("steps.reserve.response") == {"reservation_id": "R-1"}
    assert built("{id: payload.order_id, first: payload.items[0]}") == {"id": "A-1", "first": PAYLOAD["items"][0]}


def test_expressions_see_the_saga_with_its_instant_in_rfc_3339() -> None:
    assert built({"saga": "saga"}) == {
        "saga": {
            "saga_id": SAGA.saga_id,
            "workflow_name": "order",
            "workflow_version": 3,
            "correlation_id": "corr-1",
            "initiated_by": "shop",
            "created_at": "2026-03-01T03:00:00.123Z",
        }
    }
    at_zero = msgspec.structs.replace(SAGA, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    assert built({"at": "saga.created_at"}, at_zero) == {"at": "2026-01-01T00:00:00.000Z"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("payload.items", "input: expected an object, the expression gave a list"),
        ("payload.order_id", "input: expected an object, the expression gave a string"),
        ("payload.total", "input: expected an object, the expression gave a number"),
        ("payload.gift", "input: expected an object, the expression gave a boolean"),
        ("payload.none", "input: expected an object, the expression gave null"),
        ("payload.[", "input: the expression ends too early"),
        ({"a": {"b": ["payload", "abs(payload)"]}}, "input.a.b[1]: abs() takes number, not object"),
        ({"a": "contains('abc', `1`)"}, "input.a: 'in <string>' requires string"),
        ({"a": "'a' < `1`"}, "input.a: '<' not supported between"),
        ({"a": "to_number('nan')"}, "input.a: gives the number nan, which JSON does not have"),
        ({"a": "sum([`1e308`, `1e308`])"}, "input.a: gives the number inf, which JSON does not have"),
        ({"a": "ceil(to_number('inf'))"}, "input.a: cannot convert float infinity to integer"),
        ({"a": "&payload"}, "input.a: gives an expression reference (&), not a value"),
        ({"a": "[[&payload]]"}, "input.a: gives an expression reference (&), not a value"),
        ({"a": "to_string(&payload)"}, "input.a: gives an expression reference (&), not a value"),
        ({"a": "nope(payload)"}, "input.a: unknown function nope; known: "),
    ],
)
def test_a_request_that_cannot_be_built_fails_with_the_path(template: Any, text: str) -> None:
    error = failure(template)
    assert str(error).startswith(text)
    assert str(error) == f"{error.path}: {error.reason}"


def test_a_message_shows_only_the_beginning_of_a_long_value() -> None:
    assert len(failure({"a": "abs(payload)"}, saga_with({"x": "y" * 100_000})).reason) <= 200


DOUBLING = {
    "lists within lists": "payload" + " | [@, @]" * 40,
    "flattened lists": "[payload]" + " | [@, @][]" * 40,
    "objects": "payload" + " | {a: @, b: @}" * 40,
    "compared": "payload" + " | {a: @, b: @}" * 30 + " | @ == @",
    "mapped": "payload" + " | map(&[@, @], [@, @])" * 30,
    "joined": "payload.text" + " | join(@, [@, @, @, @])" * 40,
    "printed": "payload" + " | to_string([@, @])" * 40,
    "wide": "payload" + (" | [" + ", ".join("@" * 20) + "][]") * 20,
}


@pytest.mark.parametrize("expression", DOUBLING.values(), ids=DOUBLING)
def test_an_expression_that_doubles_its_result_again_and_again_is_stopped(expression: str) -> None:
    payload = {"text": "abcdefgh" * 100, "items": list(range(1000))}
    assert failure({"a": expression}, saga_with(payload)).reason == "the result is too large or takes too much work"


def test_the_work_of_all_leaves_of_a_request_is_bounded_together() -> None:
    payload = {"items": list(range(10_000))}
    assert built({"a": "payload.items"}, saga_with(payload)) == {"a": payload["items"]}
    assert failure({"a": ["payload.items"] * 100}, saga_with(payload)).path.startswith("input.a[")


def test_a_large_payload_can_be_mapped() -> None:
    payload = {"items": [{"sku": f"sku-{n}", "quantity": n} for n in range(10_000)]}
    request = built({"lines": "payload.items[*].{id: sku, count: quantity}"}, saga_with(payload))
    assert request["lines"][-1] == {"id": "sku-9999", "count": 9999}


def test_the_expressions_of_the_documentation_give_what_it_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "workflow.md").read_text(encoding="utf-8")
    (given_payload,) = re.findall(r"^\| expression \| gives, for `(.*)` \|$", text, re.MULTILINE)
    table = text.partition(given_payload)[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`+) ?(.+?) ?\1 \| `([^`]+)`", table, re.MULTILINE)
    assert len(rows) == 7
    for _, expression, value in rows:
        request = built({"x": expression.replace("\\|", "|")}, saga_with(json.loads(given_payload)))
        assert request == {"x": json.loads(value)}, expression


# --- expressions -----------------------------------------------------------------------------------------------------


def test_an_expression_is_compiled_once() -> None:
    assert compile_expression("payload.once") is compile_expression("payload.once")


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", None),
        ("   ", 3),
        ("payload.", 8),
        ("payload..a", 8),
        ("(payload", 8),
        ("payload #", 8),
        ("payload = payload", 8),
        ("'open", 0),
        ("payload.a == `abc`", 13),
        ("`NaN`", 0),
        ("`" + "[" * 1000 + "`", 0),
        ("`1e999`", None),
        ('payload."\\u0000"', None),
        ('payload."\\ud800"', None),
        ('`"\\u0000"`', None),
        ("payload[::0]", None),
        ("nope(payload)", None),
        ("abs()", None),
        ("not_null()", None),
        ("(" * 1000 + "payload", None),
        ("!" * 2000 + "payload", None),
        ("payload" + "|payload" * 60, None),
        ("a" * (MAX_EXPRESSION_CHARS + 1), None),
        ("payload.\ud800", 8),
    ],
)
def test_a_bad_expression_is_refused_where_it_goes_wrong(text: str, position: int | None) -> None:
    with pytest.raises(BadExpression) as caught:
        compile_expression(text)
    assert caught.value.position == position


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("payload.anything.at.all", 0),
        ("saga.saga_id", 0),
        ("steps.a.response.x", 0),
        ('steps."a".response', 0),
        ("steps", 0),
        ("@", 0),
        ("steps.*.response", 0),
        ("payload.items[*].sku", 0),
        ("payload.items[?kind == 'x'].sku | [0].name", 0),
        ("sort_by(payload.items, &price)[0].name", 0),
        ("payload | items", 0),
        ("{a: payload.a, b: [saga.created_at, steps.a.response]}", 0),
        ("paylod.a", 1),
        ("a || b", 2),
        ("{a: x, b: [y, steps.z.response]}", 3),
        ("length(items)", 1),
        ("saga.id", 1),
        ("steps.b.response", 1),
        ("steps.a.responses", 1),
        ("steps | b", 1),
        ("payload.items[*].x || steps.b", 1),
        ("sort_by(items, &price)", 1),
    ],
)
def test_names_that_can_never_be_there_are_found_and_others_are_left_alone(expression: str, wrong: int) -> None:
    assert len(compile_expression(expression).wrong_names(["a"])) == wrong


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab c"), inner, max_size=3),
    max_leaves=8,
)
expressions = st.recursive(
    st.sampled_from(["payload", "@", "a", "b", "*", "[0]", "[-1]", "[]", "'x'", "`1`", "`null`", "[::2]", "[*]", "&a"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([".", " | ", " || ", " && ", " == ", " < ", " >= "]), inner).map("".join),
        st.tuples(
            st.sampled_from(sorted(Functions.FUNCTION_TABLE)),
            st.lists(inner, min_size=1, max_size=2),
        ).map(lambda call: f"{call[0]}({', '.join(call[1])})"),
        inner.map(lambda one: f"[{one}]"),
        inner.map(lambda one: f"{{a: {one}, b: {one}}}"),
        inner.map(lambda one: f"!{one}"),
        inner.map(lambda one: f"payload[?{one}]"),
    ),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(expressions, st.dictionaries(st.sampled_from("ab"), json_values))
def test_any_expression_over_any_payload_gives_json_or_a_mapping_failure(expression: str, payload: Json) -> None:
    step = Step(name="s", service="s", method="A.B", input={"x": expression})
    # Any other exception fails the test.
    with suppress(MappingFailed):
        request, _ = build_request(step, StepAction.EXECUTE, saga_with(payload), RESPONSES)
        msgspec.json.encode(request)
        check_json(request, Budget())


def test_a_value_that_json_does_not_have_is_refused_wherever_it_hides() -> None:
    for value in ({"a": [float("inf")]}, [1 << 2000], {"a": object()}):
        with pytest.raises(EvaluationFailed):
            check_json(value, Budget())


def test_evaluating_does_not_change_the_payload() -> None:
    before = msgspec.json.encode(PAYLOAD)
    built({"a": "reverse(payload.items)", "b": "merge(payload, {x: `1`})", "c": "sort_by(payload.items, &quantity)"})
    assert msgspec.json.encode(PAYLOAD) == before


def test_an_expression_keeps_its_text() -> None:
    expression = compile_expression("payload.a")
    assert isinstance(expression, Expression)
    assert expression.text == "payload.a"
