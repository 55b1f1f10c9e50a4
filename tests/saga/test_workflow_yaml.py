"""Workflow texts as a whole: every error at once, where it stands, and texts that mean harm."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from saga import yaml_nodes
from saga.errors import Detail, WorkflowInvalid
from saga.workflow import WorkflowDefinition, decode_definition, encode_definition
from saga.workflow_yaml import MAX_YAML_BYTES, format_detail, parse_workflow
from server.config_loading import load_config

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "workflows" / "order-fulfillment.yaml"

GOOD = """\
name: order
timeout_secs: 60
steps:
  - name: reserve
    service: inventory
    method: InventoryService.Reserve
    compensate: InventoryService.Release
    retry: {max_attempts: 3, backoff: linear, non_retryable: [ABORTED]}
    input:
      order_id: payload.order_id
      items: "payload.items[*].{sku: sku, count: quantity}"
  - name: charge
    service: payment
    method: PaymentService.Charge
    input: steps.reserve.response
"""


def details_of(text: str | bytes) -> tuple[Detail, ...]:
    with pytest.raises(WorkflowInvalid) as caught:
        parse_workflow(text)
    return caught.value.details


# --- every error at once ---------------------------------------------------------------------------------------------


def test_every_error_is_reported_at_once_in_the_order_of_the_text_with_line_and_column() -> None:
    text = """\
name: [order]
timeout_sec: 60
steps:
  - name: reserve
    service: inventory
    method: Reserve
  - name: reserve
    retry:
      max_attempts: 0
      backof: linear
    method: PaymentService.Charge
    input:
      items:
        - payload.a
        - payload.b.
"""
    with pytest.raises(WorkflowInvalid) as caught:
        parse_workflow(text, ["payment"])
    assert [(d.line, d.column, d.field, d.reason) for d in caught.value.details] == [
        (1, 7, "name", "type"),
        (2, 1, "timeout_sec", "unknown_key"),
        (5, 14, "steps[0].service", "unknown_service"),
        (6, 13, "steps[0].method", "value"),
        (7, 5, "steps[1].service", "missing"),
        (7, 11, "steps[1].name", "duplicate"),
        (9, 21, "steps[1].retry.max_attempts", "range"),
        (10, 7, "steps[1].retry.backof", "unknown_key"),
        (15, 21, "steps[1].input.items[1]", "expression"),
    ]
    assert str(caught.value) == (
        "invalid workflow: name: expected string of 1 to 255 characters, got a list (and 8 more)"
    )


@pytest.mark.parametrize(
    ("key", "path", "hint"),
    [
        ("stepz: 1", "stepz", "did you mean steps?"),
        ("timeout: 1", "timeout", "did you mean timeout_secs?"),
        ("zzz: 1", "zzz", "known: name, steps, timeout_secs"),
        ('"a b": 1', '"a b"', "known: name, steps, timeout_secs"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, path: str, hint: str) -> None:
    (detail,) = details_of(f"{GOOD}{key}\n")
    assert (detail.field, detail.reason, detail.message) == (path, "unknown_key", f"unknown key; {hint}")


def test_a_duplicate_key_is_refused_wherever_it_stands() -> None:
    (detail,) = details_of(GOOD + "name: other\n")
    assert (detail.field, detail.message) == ("name", "duplicate key, the first one is on line 1")
    (detail,) = details_of(GOOD.replace("max_attempts: 3,", "max_attempts: 3, max_attempts: 4,"))
    assert (detail.field, detail.reason) == ("steps[0].retry.max_attempts", "duplicate_key")
    (detail,) = details_of(
        GOOD.replace("      order_id: payload", "      order_id: payload.x\n      order_id: payload")
    )
    assert (detail.field, detail.line) == ("steps[0].input.order_id", 11)


def test_more_errors_than_anyone_reads_are_not_listed() -> None:
    details = details_of(GOOD + "".join(f"key{n}: 1\n" for n in range(yaml_nodes.MAX_FAULTS + 5)))
    assert len(details) == yaml_nodes.MAX_FAULTS + 1
    assert details[-1].message == "there are more than these 1000 errors"


def test_a_step_that_is_wrong_is_told_of_although_an_earlier_one_is_not_yaml_we_take() -> None:
    details = details_of(GOOD.replace("inventory\n", "&a inventory\n").replace("PaymentService.Charge", "Charge"))
    assert [detail.field for detail in details] == ["steps[0].service", "steps[1].method"]


# --- YAML is untrusted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "reason", "line", "column"),
    [
        ("", "", "empty", 1, 1),
        ("  \n# only a comment\n", "", "empty", 1, 1),
        ("---\n", "", "empty", 1, 1),
        ("just text", "", "type", 1, 1),
        ("- name: a", "", "type", 1, 1),
        ("name: a\nsteps: *x\n", "steps", "alias", 2, 8),
        ("name: &x a\nsteps: []\n", "name", "anchor", 1, 7),
        ("name: !!python/object:os.system a\n", "name", "tag", 1, 7),
        ("name: !custom a\n", "name", "tag", 1, 7),
        ("name: !!str 1\n", "name", "tag", 1, 7),
        ("name: a\nsteps: [\n", "", "syntax", 3, 1),
        ("name: a: b\n", "", "syntax", 1, 8),
        ("\tname: a\n", "", "syntax", 1, 1),
        ("name: a\nsteps: \0\n", "", "syntax", 2, 8),
        ("name: a\n\x1b", "", "syntax", 2, 1),
        ("name: '\ud800'", "", "syntax", 1, 8),
        (b"name: a\nb: \xff\n", "", "encoding", 2, 4),
        ("name: a\n".encode("utf-16"), "", "encoding", 1, 1),
    ],
)
def test_yaml_that_is_not_a_plain_document_is_refused_where_it_goes_wrong(
    text: str | bytes, field: str, reason: str, line: int, column: int
) -> None:
    found = [(detail.field, detail.reason, detail.line, detail.column) for detail in details_of(text)]
    assert (field, reason, line, column) in found


def test_a_second_document_is_refused() -> None:
    (detail,) = details_of(f"{GOOD}---\n{GOOD}")
    assert (detail.reason, detail.line) == ("documents", GOOD.count("\n") + 1)


def test_merge_keys_are_refused() -> None:
    messages = [detail.message for detail in details_of(GOOD + "<<: {name: x}\n")]
    assert messages == [
        "expected a string as key, got <<, which has a meaning of its own in YAML; merge keys are not allowed"
    ]


def test_a_byte_order_mark_and_crlf_line_ends_are_accepted() -> None:
    expected = parse_workflow(GOOD)
    assert parse_workflow(b"\xef\xbb\xbf" + GOOD.encode()) == expected
    assert parse_workflow(GOOD.replace("\n", "\r\n")) == expected
    assert parse_workflow(f"%YAML 1.2\n---\n{GOOD}...\n") == expected


def test_a_text_of_256_kib_is_read_and_a_longer_one_is_refused() -> None:
    full = GOOD + "#" * (MAX_YAML_BYTES - len(GOOD))
    assert parse_workflow(full) == parse_workflow(full.encode()) == parse_workflow(GOOD)
    for longer in (full + "#", (full + "#").encode(), GOOD + "#" + "é" * (MAX_YAML_BYTES // 2)):
        (detail,) = details_of(longer)
        assert (detail.reason, detail.message) == ("too_large", "expected at most 262144 bytes of YAML")


def nested(levels: int) -> str:
    return "name: w\nsteps: [{name: a, service: s, method: A.B, input: {a: " + "[" * levels + "]" * levels + "}}]"


def test_nesting_is_bounded() -> None:
    # The document, the list of steps, the step and its input take four of the levels.
    parse_workflow(nested(yaml_nodes.MAX_DEPTH - 4))
    (detail,) = details_of(nested(yaml_nodes.MAX_DEPTH - 3))
    assert (detail.reason, detail.message) == ("too_deep", "nested too deeply, expected at most 64 levels")
    assert detail.field.startswith("steps[0].input.a[0][0]")


def as_step(inputs: str) -> str:
    return f"name: w\nsteps:\n- name: a\n  service: s\n  method: A.B\n  input: {{i: [{inputs}]}}\n"


def filled(part: str) -> str:
    return part * (MAX_YAML_BYTES // len(part.encode()))


HARMFUL = {
    "brackets": filled("["),
    "braces": filled("{"),
    "dashes": filled("- "),
    "question marks": filled("? "),
    "flow pairs": "[" + filled("a: b,"),
    "flow questions": "[" + filled("? a,"),
    "aliases": "[" + filled("*a,"),
    "anchors": "[" + filled("&a b,"),
    "tags": "[" + filled("!a b,"),
    "the same key": filled("a:\n"),
    "unknown keys": "".join(f"name{n}: 1\n" for n in range(18_000)),
    "indents": "".join(" " * n + "a:\n" for n in range(700)),
    "digits": "name: " + filled("1"),
    "underscores": "name: " + filled("1_"),
    "sexagesimal": "name: " + filled("1:"),
    "a date that is none": "name: 2001-01-01" + filled(" ") + "x",
    "a long key": filled("a") + ": 1",
    "many values": as_step("1," * 130_000),
    "many expressions": as_step(",".join(f"payload.a{n}" for n in range(18_000))),
    "long expressions": as_step(",".join(f"'payload.{'a.' * 1000}b{n}'" for n in range(120))),
    "wrong expressions": as_step(filled("a,")),
    "deep expressions": as_step(",".join("'" + "(" * 2000 + "'" for _ in range(120))),
    "literals": as_step(",".join("'[" + "`1`," * 400 + f"`{n}`]'" for n in range(150))),
    "empty lines": filled("\n"),
    "a long comment": "#" + filled("x"),
    "a long quoted text": 'name: "' + filled("\\n") + '"',
    "documents": filled("---\n"),
}


@pytest.mark.parametrize("text", HARMFUL.values(), ids=HARMFUL)
def test_the_worst_256_kib_take_less_than_two_seconds_of_the_processor(text: str) -> None:
    text = text[:MAX_YAML_BYTES]
    began = time.process_time()
    with suppress(WorkflowInvalid):
        parse_workflow(text)
    # Without the C parser, which every wheel of PyYAML has, it is some four times that.
    assert time.process_time() - began < (2.0 if yaml.__with_libyaml__ else 10.0)


def test_an_aliases_bomb_is_refused_unexpanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert {detail.reason for detail in details_of("\n".join(lines))} == {"anchor", "alias", "unknown_key", "missing"}


def test_the_parser_in_python_gives_the_same_as_the_one_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        GOOD,
        SAMPLE.read_text(),
        "name: &x a\nsteps: [*x, !y z]\n",
        "",
        "---\na: 1\n---\nb: 2",
        '"\\ud800"',
    ]

    def outcomes() -> list[WorkflowDefinition | list[tuple[str, str, int | None]]]:
        found: list[WorkflowDefinition | list[tuple[str, str, int | None]]] = []
        for text in texts:
            try:
                found.append(parse_workflow(text))
            except WorkflowInvalid as invalid:
                found.append([(d.field, d.reason, d.line) for d in invalid.details if text != '"\\ud800"'])
        return found

    in_c = outcomes()
    monkeypatch.setattr(yaml_nodes, "_PARSER", yaml.SafeLoader)
    assert outcomes() == in_c


# --- whatever comes --------------------------------------------------------------------------------------------------


def parses_or_says_why(text: str | bytes) -> None:
    try:
        definition = parse_workflow(text, ["inventory", "payment"])
    except WorkflowInvalid as invalid:
        details = invalid.details
    else:
        assert decode_definition(encode_definition(definition)) == definition
        return
    assert details
    for detail in details:
        assert detail.message
        assert detail.line is None or detail.line >= 1
        assert detail.column is None or detail.column >= 1
        assert "\n" not in format_detail("f", detail)


def mutations() -> st.SearchStrategy[str]:
    pieces = st.sampled_from(
        [
            "",
            " ",
            "\n",
            "\t",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ": ",
            "*a",
            "&a ",
            "!a ",
            "'",
            '"',
            "|",
            ">",
            "%",
            "#",
            "0",
            "1e9",
        ]
    ) | st.sampled_from(
        [".inf", "yes", "null", "~", "<<: ", "? ", "---\n", "payload.", "`", "\0", "\ud800", "é", "\\", "@", "$", "-1"]
    )
    cut = st.tuples(st.integers(0, len(GOOD)), st.integers(0, 8), pieces)

    def apply(cuts: list[tuple[int, int, str]]) -> str:
        text = GOOD
        for start, length, piece in cuts:
            text = text[:start] + piece + text[start + length :]
        return text

    return st.lists(cut, min_size=1, max_size=6).map(apply)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_parse_or_are_refused_with_a_reason(text: bytes) -> None:
    parses_or_says_why(text)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400))
@example('"\\UFFFFFFFF"')
@example("? ")
@example("? [a]\n: b")
@example("!")
@example("&a")
def test_any_text_parses_or_is_refused_with_a_reason(text: str) -> None:
    parses_or_says_why(text)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutations())
def test_a_good_text_that_was_changed_parses_or_is_refused_with_a_reason(text: str) -> None:
    parses_or_says_why(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("payload.steps[]*?(){}&|!=<>`'\"@,:-0123 \\ab"), max_size=60))
def test_any_expression_compiles_or_is_refused_with_a_reason(expression: str) -> None:
    quoted = expression.replace("'", "''")
    parses_or_says_why(GOOD.replace("steps.reserve.response", f"'{quoted}'"))


# --- what is read is what was written --------------------------------------------------------------------------------


def test_the_same_definition_written_otherwise_is_equal_and_has_the_same_text() -> None:
    other = GOOD.replace("timeout_secs: 60", "timeout_secs: 60.0 # a minute").replace("name: order", '"name": "order"')
    assert parse_workflow(other) == parse_workflow(GOOD)
    assert encode_definition(parse_workflow(other)) == encode_definition(parse_workflow(GOOD))
    assert decode_definition(encode_definition(parse_workflow(GOOD))) == parse_workflow(GOOD)


def test_the_sample_workflow_parses_and_has_an_undo_for_every_step() -> None:
    definition = parse_workflow(SAMPLE.read_bytes(), ["inventory", "payment", "shipping"])
    assert definition.name == "order-fulfillment"
    assert [(step.name, step.service, step.method, step.compensate) for step in definition.steps] == [
        ("reserve-inventory", "inventory", "InventoryService.Reserve", "InventoryService.Release"),
        ("process-payment", "payment", "PaymentService.Charge", "PaymentService.Refund"),
        ("arrange-shipping", "shipping", "ShippingService.CreateShipment", "ShippingService.CancelShipment"),
    ]


def test_the_examples_of_the_documentation_parse(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "workflow.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for block in blocks:
        if block.startswith("services:"):
            (tmp_path / "config.yaml").write_text(block)
            assert load_config(tmp_path / "config.yaml", {}).services
        else:
            parse_workflow(block)


# --- lines -----------------------------------------------------------------------------------------------------------


def test_an_error_is_a_line_an_editor_can_jump_to() -> None:
    detail = Detail(field="steps[1].retry.max_attempts", reason="range", message="expected int >= 1", line=9, column=21)
    assert format_detail("w.yaml", detail) == "w.yaml:9:21: steps[1].retry.max_attempts: expected int >= 1"
    assert format_detail("w.yaml", Detail(field="", reason="x", message="no")) == "w.yaml: no"
