"""Reads workflow definitions from YAML: untrusted text in, a checked definition or every error at once out.

The fields, their types and defaults are those of `docs/workflow.md`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from saga.errors import Detail, WorkflowInvalid
from saga.expressions import BadExpression, compile_expression
from saga.workflow import (
    DEFAULT_COMPENSATE_RETRY,
    DEFAULT_STEP_TIMEOUT_SECS,
    STATUS_CODES,
    Backoff,
    OnUnknown,
    RetryPolicy,
    Step,
    WorkflowDefinition,
)
from saga.yaml_fields import MapReader
from saga.yaml_nodes import (
    MAX_YAML_BYTES,
    Fault,
    Faults,
    Fields,
    Items,
    Kind,
    Mark,
    Node,
    Refused,
    Scalar,
    cut,
    describe,
    join,
    kind_of,
    read_nodes,
    value_of,
)

__all__ = ["MAX_STEPS", "MAX_TIMEOUT_SECS", "MAX_YAML_BYTES", "format_detail", "parse_workflow"]

MAX_STEPS = 1000
"""A bound for memory and for the width of lists, not for ambition: the largest sagas we know of have some dozens."""

MAX_TIMEOUT_SECS = 10 * 365 * 86400.0
"""Ten years. Longer ones are taken for a mistake, and stay far from the last instant a database can store."""

_IDENTIFIER = "[A-Za-z_][A-Za-z0-9_]*"
_METHOD = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})+")
_METHOD_FORM = "Service.Method or package.Service.Method"

_INT_BOUNDS = (-(2**63), 2**64 - 1)
"""What protobuf's 64-bit integers can hold; larger numbers go as strings."""


def parse_workflow(text: str | bytes, services: Collection[str] | None = None) -> WorkflowDefinition:
    """The definition in one YAML document.

    `services`: the names that are configured; a step that calls another one is an error. None: not checked.
    `WorkflowInvalid`, and nothing else, for any text that is not a definition: its details name every fault, with path,
    line and column, in the order of the text.
    """
    faults = Faults()
    root = read_nodes(text, faults)
    definition = _definition(root, None if services is None else frozenset(services), faults) if root else None
    if faults or definition is None:
        details = tuple(_detail(fault) for fault in faults.in_order())
        raise WorkflowInvalid(_summary(details), details)
    return definition


def format_detail(file: str | Path, detail: Detail) -> str:
    """One error as a line an editor can jump to: `file:line:col: path: message`."""
    place = str(file)
    if detail.line is not None:
        place += f":{detail.line}:{detail.column}"
    return f"{place}: {detail.field}: {detail.message}" if detail.field else f"{place}: {detail.message}"


def _detail(fault: Fault) -> Detail:
    return Detail(field=fault.path, reason=fault.reason, message=fault.message, line=fault.line, column=fault.column)


def _summary(details: tuple[Detail, ...]) -> str:
    first = details[0]
    text = f"invalid workflow: {first.field}: {first.message}" if first.field else f"invalid workflow: {first.message}"
    return text if len(details) == 1 else f"{text} (and {len(details) - 1} more)"


# --- the fields ------------------------------------------------------------------------------------------------------


def _definition(root: Node, services: frozenset[str] | None, faults: Faults) -> WorkflowDefinition:
    fields = MapReader(root, "", faults)
    # Sagas are started and listed by it, and what asks for a workflow may only name what prints.
    name = fields.string("name", printable=True)
    timeout_secs = fields.optional_number("timeout_secs", low=0, high=MAX_TIMEOUT_SECS, above_low=True)
    steps_node = fields.take("steps", required=True)
    fields.close()
    return WorkflowDefinition(name=name, timeout_secs=timeout_secs, steps=_steps(steps_node, services, faults))


def _steps(node: Node | None, services: frozenset[str] | None, faults: Faults) -> tuple[Step, ...]:
    if node is None:
        return ()
    if not isinstance(node, Items):
        faults.note("steps", "type", f"expected a list of 1 or more steps, got {describe(node)}", node)
        return ()
    if not 1 <= len(node.items) <= MAX_STEPS:
        faults.note("steps", "range", f"expected a list of 1 to {MAX_STEPS} steps, got {len(node.items)}", node)
        return ()
    names = [_step_name(item) for item in node.items]
    first_with: dict[str, int] = {}
    steps = []
    for index, item in enumerate(node.items):
        name = names[index]
        path = f"steps[{index}]"
        if name is not None and first_with.setdefault(name, index) != index:
            faults.note(
                f"{path}.name",
                "duplicate",
                f"duplicate step name {cut(name, 60)!r}, steps[{first_with[name]}] has it",
                item.fields["name"][1] if isinstance(item, Fields) else item,
            )
        # An undo also has the responses of its own step and of those that came after it.
        reachable = _Reachable(before=frozenset(first_with) - {name or ""}, every=names)
        steps.append(_step(item, path, services, reachable, faults))
    return tuple(steps)


class _Reachable(msgspec.Struct, frozen=True):
    """The steps whose responses an expression may ask for: those before it, or, for a compensation, any."""

    before: frozenset[str]
    every: list[str | None]


def _step_name(node: Node) -> str | None:
    found = node.fields.get("name") if isinstance(node, Fields) else None
    return found[1].text if found is not None and isinstance(found[1], Scalar) else None


def _step(node: Node, path: str, services: frozenset[str] | None, reachable: _Reachable, faults: Faults) -> Step:
    fields = MapReader(node, path, faults)
    name = fields.string("name")
    service = fields.string("service")
    if services is not None and service and service not in services:
        known = cut(", ".join(sorted(services)), 400) or "none, the configuration has no services"
        fields.refuse("service", "unknown_service", f"unknown service {cut(service, 60)}; known: {known}")
    method = fields.string("method", matching=_METHOD, expected=_METHOD_FORM)
    compensate = fields.optional_string("compensate", matching=_METHOD, expected=_METHOD_FORM)
    timeout_secs = fields.number(
        "timeout_secs", DEFAULT_STEP_TIMEOUT_SECS, low=0, high=MAX_TIMEOUT_SECS, above_low=True
    )
    retry = _policy(fields.section("retry"), RetryPolicy())
    patient = msgspec.structs.replace(retry, max_attempts=DEFAULT_COMPENSATE_RETRY.max_attempts)
    step = Step(
        name=name,
        service=service,
        method=method,
        compensate=compensate,
        timeout_secs=timeout_secs,
        retry=retry,
        compensate_retry=_policy(fields.section("compensate_retry"), patient),
        on_unknown=fields.choice("on_unknown", OnUnknown, OnUnknown.SKIP),
        input=_template_under(fields, "input", reachable.before),
        compensate_input=_template_under(
            fields, "compensate_input", frozenset(step for step in reachable.every if step is not None)
        ),
    )
    fields.close()
    return step


def _policy(fields: MapReader | None, default: RetryPolicy) -> RetryPolicy:
    if fields is None:
        return default
    non_retryable = default.non_retryable
    if fields.take("non_retryable") is not None:
        codes = fields.each("non_retryable", lambda node, path: _code(node, path, fields.faults))
        non_retryable = frozenset(codes)
    policy = RetryPolicy(
        max_attempts=fields.integer("max_attempts", default.max_attempts, low=1),
        backoff=fields.choice("backoff", Backoff, default.backoff),
        initial_interval_ms=fields.integer("initial_interval_ms", default.initial_interval_ms, low=0),
        max_interval_ms=_or(fields.optional_integer("max_interval_ms", low=0), default.max_interval_ms),
        jitter=fields.number("jitter", default.jitter, low=0, high=1),
        non_retryable=non_retryable,
    )
    fields.close()
    return policy


def _or(value: int | None, default: int | None) -> int | None:
    return default if value is None else value


def _code(node: Node, path: str, faults: Faults) -> str:
    if isinstance(node, Refused):
        return ""
    if isinstance(node, Scalar) and node.text in STATUS_CODES:
        return node.text
    faults.note(path, "value", f"expected one of {' '.join(STATUS_CODES)}, got {describe(node)}", node)
    return ""


# --- input -----------------------------------------------------------------------------------------------------------


def _template_under(fields: MapReader, key: str, steps: frozenset[str]) -> Any:
    """A map or an expression that gives one; None: absent."""
    node = fields.take(key)
    if node is None:
        return None
    if isinstance(node, Items) or (isinstance(node, Scalar) and kind_of(node) not in (Kind.STRING, Kind.AMBIGUOUS)):
        fields.refuse(key, "type", f"expected a map or an expression, got {describe(node)}")
        return None
    return _template(node, fields.path_of(key), steps, fields.faults)


def _template(node: Node, path: str, steps: frozenset[str], faults: Faults) -> Any:
    """The value `mapping.build_request` reads: strings in it are expressions, all else stands for itself."""
    if isinstance(node, Fields):
        built = {}
        for key, (mark, inner) in node.fields.items():
            if "\0" in key:
                faults.note(join(path, key), "key", "a key cannot hold a NUL", mark)
            built[key] = _template(inner, join(path, key), steps, faults)
        return built
    if isinstance(node, Items):
        return [_template(item, f"{path}[{index}]", steps, faults) for index, item in enumerate(node.items)]
    if isinstance(node, Refused):
        return None
    value = value_of(node)
    if kind_of(node) is Kind.AMBIGUOUS:
        wanted = "an expression, a number, true, false or null"
        faults.note(path, "type", f"expected {wanted}, got {describe(node)}", node)
    elif isinstance(value, str):
        _check_expression(value, node, path, steps, faults)
    elif isinstance(value, int) and not _INT_BOUNDS[0] <= value <= _INT_BOUNDS[1]:
        faults.note(path, "range", "expected a number of at most 64 bits; write a larger one as a string", node)
    return value


def _check_expression(text: str, node: Scalar, path: str, steps: frozenset[str], faults: Faults) -> None:
    if faults.full:
        return
    try:
        wrong_names = compile_expression(text).wrong_names(steps)
    except BadExpression as error:
        where = "" if error.position is None else f" (at character {error.position + 1} of the expression)"
        message = f"expected a JMESPath expression: {error.message}{where}"
        faults.note(path, "expression", message, _inside(node, error.position))
        return
    for message in wrong_names:
        faults.note(path, "expression", message, node)


def _inside(node: Scalar, position: int | None) -> Mark:
    """Where in the file a character of an expression stands; the start of the scalar where that cannot be told."""
    mark = node.mark
    if position is None or mark.column is None or not node.plain or "\n" in node.text:
        return mark
    return Mark(line=mark.line, column=mark.column + position)
