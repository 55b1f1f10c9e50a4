"""JMESPath expressions of a workflow: compiled and checked once, evaluated within bounds.

Workflows are untrusted text and the engine shares one thread with every other saga, so an expression is bounded twice:
in its size when it is compiled, and in the work it may do when it is evaluated. JMESPath has no loops, but
`[@, @][] | [@, @][] | ...` doubles a list at each pipe.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from jmespath.exceptions import (
    EmptyExpressionError,
    IncompleteExpressionError,
    JMESPathError,
    JMESPathTypeError,
    LexerError,
    ParseError,
)
from jmespath.functions import Functions, signature
from jmespath.parser import Parser
from jmespath.visitor import Options, TreeInterpreter

if TYPE_CHECKING:
    from jmespath.visitor import _TreeNode

MAX_EXPRESSION_CHARS = 2048
"""Far above any request we have seen written in one expression; keeps parsing in the range of milliseconds."""

MAX_EXPRESSION_DEPTH = 50
"""Brackets, or operators, within each other. The interpreter recurses three frames a level; Python stops at 1000."""

MAX_WORK = 500_000
"""Units of work for one request, about one visited value each: some 0.3 s at the very worst, a thousand times what a
usual request takes."""

SAGA_FIELDS = ("saga_id", "workflow_name", "workflow_version", "correlation_id", "initiated_by", "created_at")
"""What an expression finds under `saga`."""

ROOT_NAMES = ("saga", "payload", "steps")

_QUOTED = re.compile(
    r"""'(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" | `(?P<literal>(?:\\.|[^`\\])*)`""", re.DOTALL | re.VERBOSE
)
_JSON_STRING = re.compile(r'"(?:\\.|[^"\\])*"', re.DOTALL)


class BadExpression(ValueError):
    """The text is no expression we accept. `position` counts characters from 0; None: it is the whole text."""

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


class EvaluationFailed(ValueError):
    """The expression, or what it gave, cannot be used with these values; the text says why."""


class Budget:
    """The work that is left for one request."""

    def __init__(self, units: int = MAX_WORK) -> None:
        self.left = units

    def spend(self, units: int) -> None:
        """Raises `EvaluationFailed` when there is not that much left; called before the memory is taken."""
        self.left -= units
        if self.left < 0:
            raise EvaluationFailed("the result is too large or takes too much work")


class Expression:
    """A compiled expression; get one from `compile_expression`."""

    def __init__(self, text: str, tree: _TreeNode) -> None:
        self.text = text
        self._tree = tree

    def evaluate(self, values: dict[str, Any], budget: Budget) -> Any:
        """What the expression gives for these values, proven to be JSON. `EvaluationFailed`, and nothing else."""
        try:
            result = _BoundedInterpreter(budget).visit(self._tree, values)
            check_json(result, budget)
        except EvaluationFailed:
            raise
        except JMESPathTypeError as error:
            # Its own words have the value in them, which may be one that is not to be shown.
            expected = " or ".join(error.expected_types)
            reason = f"{error.function_name}() takes {expected}, not {error.actual_type}"
            raise EvaluationFailed(_cut(reason)) from error
        # Whatever the interpreter trips over (it lets TypeError, OverflowError and others of Python through, say for
        # `contains('a', `1`)`) is a fault of the expression or of the values, never a reason to stop the saga's task.
        except Exception as error:
            raise EvaluationFailed(_cut(str(error) or type(error).__name__)) from error
        return result

    def wrong_names(self, steps: Collection[str]) -> list[str]:
        """A message for each name that can never be there; such a name would quietly give null on every run.

        `steps`: the names of the steps whose responses the expression may ask for.
        """
        messages: list[str] = []
        _follow(self._tree, (), frozenset(steps), messages)
        return messages


@functools.lru_cache(maxsize=512)
def compile_expression(text: str) -> Expression:
    """The compiled form of `text`, made once. `BadExpression`, and nothing else, for a text that has none."""
    if len(text) > MAX_EXPRESSION_CHARS:
        raise BadExpression(f"expected at most {MAX_EXPRESSION_CHARS} characters, got {len(text)}")
    _check_quoted(text)
    if _nesting(_QUOTED.sub("", text)) > MAX_EXPRESSION_DEPTH:
        raise BadExpression(f"nested too deeply, expected at most {MAX_EXPRESSION_DEPTH} levels")
    try:
        # Not `jmespath.compile`: its module-wide cache of 512 would keep what we cache ourselves a second time.
        tree = Parser()._parse(text).parsed  # type: ignore[attr-defined]  # private, and the only way past that cache
    except RecursionError:
        raise BadExpression(f"nested too deeply, expected at most {MAX_EXPRESSION_DEPTH} levels") from None
    except (JMESPathError, ValueError) as error:
        raise _translated(error, text) from error
    _check_tree(tree)
    return Expression(text, tree)


def check_json(value: Any, budget: Budget) -> None:
    """Raises `EvaluationFailed` unless `value` can be written as JSON; spends what its parts cost, shared ones each
    time they appear, as writing them would."""
    pending = [value]
    while pending:
        part = pending.pop()
        budget.spend(1)
        kind = type(part)
        if kind is str:
            budget.spend(len(part) >> 4)
        elif kind is dict:
            budget.spend(len(part))
            pending.extend(part.values())
        elif kind is list:
            budget.spend(len(part))
            pending.extend(part)
        elif kind is float:
            if not math.isfinite(part):
                raise EvaluationFailed(f"gives the number {part}, which JSON does not have")
        elif kind is int:
            if part.bit_length() > 1024:
                raise EvaluationFailed("gives a number that is too large")
        elif part is not None and kind is not bool:
            raise EvaluationFailed("gives an expression reference (&), not a value")


# --- evaluating ------------------------------------------------------------------------------------------------------


class _BoundedFunctions(Functions):
    """The built-in functions; those whose result can be much longer than their arguments say beforehand how long."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget

    @signature({"types": ["string"]}, {"types": ["array-string"]})
    def _func_join(self, separator: str, array: list[str]) -> str:
        self._budget.spend((len(separator) * len(array) + sum(map(len, array))) >> 4)
        return separator.join(array)

    @signature({"types": []})
    def _func_to_string(self, value: Any) -> str:
        if type(value) is str:
            return value
        # Also proves that there is no expression reference in it, which the built-in would print as an address.
        check_json(value, self._budget)
        return json.dumps(value, separators=(",", ":"))


class _BoundedInterpreter(TreeInterpreter):
    """Pays for every visit, and for the whole of what is built from parts that may be shared."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(Options(custom_functions=_BoundedFunctions(budget)))
        self._budget = budget

    def visit(self, node: _TreeNode, *args: Any, **kwargs: Any) -> Any:
        self._budget.spend(1)
        return super().visit(node, *args, **kwargs)

    def visit_multi_select_list(self, node: _TreeNode, value: Any) -> Any:
        built = super().visit_multi_select_list(node, value)
        _pay_for_parts(built or (), self._budget)
        return built

    def visit_multi_select_dict(self, node: _TreeNode, value: Any) -> Any:
        built = super().visit_multi_select_dict(node, value)
        _pay_for_parts((built or {}).values(), self._budget)
        return built


def _pay_for_parts(parts: Collection[Any], budget: Budget) -> None:
    """Spends the size of lists and objects that were put together, counting a shared part as often as it appears."""
    pending = [part for part in parts if type(part) in (dict, list, str)]
    while pending:
        part = pending.pop()
        if type(part) is str:
            budget.spend(len(part) >> 4)
            continue
        budget.spend(len(part) + 1)
        inner = part.values() if type(part) is dict else part
        pending.extend(value for value in inner if type(value) in (dict, list, str))


# --- compiling -------------------------------------------------------------------------------------------------------


def _check_quoted(text: str) -> None:
    """Refuses JSON literals that are not JSON: the library would take `` `abc` `` for a string, with a warning."""
    for match in _QUOTED.finditer(text):
        literal = match["literal"]
        if literal is None:
            continue
        literal = literal.replace("\\`", "`")
        if _nesting(_JSON_STRING.sub("", literal)) > MAX_EXPRESSION_DEPTH:
            raise BadExpression("the literal is nested too deeply", match.start())
        try:
            json.loads(literal, parse_constant=_refuse_constant)
        except ValueError:
            raise BadExpression(f"`{_cut(literal, 40)}` is not a JSON literal", match.start()) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _nesting(text: str) -> int:
    deepest = depth = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest


def _translated(error: ValueError, text: str) -> BadExpression:
    if isinstance(error, EmptyExpressionError):
        return BadExpression("the expression is empty; the empty string is written ''")
    if isinstance(error, LexerError):
        hint = ""
        if error.lexer_value in ("-", "/", " "):
            hint = '; a name with other characters than letters, digits and _ is written in quotes: steps."my-step"'
        return BadExpression(f"{_cut(error.message)}{hint}", error.lexer_position)
    if isinstance(error, IncompleteExpressionError):
        return BadExpression("the expression ends too early", len(text))
    if isinstance(error, ParseError):
        if error.lex_position >= len(text):
            return BadExpression("the expression ends too early", len(text))
        hint = ""
        if error.token_type == "NUMBER" and str(error.token_value).startswith("-"):
            hint = '; a name with a dash in it is written in quotes: steps."my-step"'
        return BadExpression(f"unexpected {_cut(str(error.token_value))!r}{hint}", error.lex_position)
    return BadExpression(_cut(str(error)))


def _check_tree(tree: _TreeNode) -> None:
    """Refuses what would fail on every run, whatever the values: unknown functions, wrong numbers of arguments."""
    for node, depth in _walk(tree):
        if depth > MAX_EXPRESSION_DEPTH:
            raise BadExpression(f"nested too deeply, expected at most {MAX_EXPRESSION_DEPTH} levels")
        kind = node["type"]
        if kind == "function_expression":
            _check_call(node["value"], len(node["children"]))
        elif kind in ("field", "literal", "key_val_pair"):
            _check_storable(node["value"])
        elif kind == "slice" and node["children"][2] == 0:  # type: ignore[comparison-overlap]  # ints here, not nodes
            raise BadExpression("the step of a slice cannot be 0")


def _walk(tree: _TreeNode) -> Iterator[tuple[_TreeNode, int]]:
    pending = [(tree, 1)]
    while pending:
        node, depth = pending.pop()
        yield node, depth
        # A slice keeps its three numbers where other nodes keep nodes.
        pending.extend((child, depth + 1) for child in node["children"] if isinstance(child, dict))


def _check_call(name: str, given: int) -> None:
    known: dict[str, dict[str, Any]] = Functions.FUNCTION_TABLE
    if name not in known:
        raise BadExpression(f"unknown function {_cut(name, 40)}; known: {', '.join(sorted(known))}")
    expected = known[name]["signature"]
    if expected[-1].get("variadic"):
        if given < len(expected):
            raise BadExpression(f"{name} takes at least {len(expected)} argument(s), got {given}")
    elif given != len(expected):
        raise BadExpression(f"{name} takes {len(expected)} argument(s), got {given}")


def _check_storable(value: Any) -> None:
    """Text in an expression may hold escapes: what they stand for must still be text a database and a peer accept."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            if "\0" in part or any("\ud800" <= char <= "\udfff" for char in part):
                raise BadExpression("the expression holds a NUL or half a surrogate pair")
        elif isinstance(part, dict):
            pending.extend(part)
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, float) and not math.isfinite(part):
            raise BadExpression("the expression holds a number that is too large")


# --- names that can never be there -----------------------------------------------------------------------------------

Place = tuple[str, ...] | None
"""Where in the values an inner expression stands: the keys from the root; None: somewhere we know nothing about."""


def _follow(node: _TreeNode, place: Place, steps: frozenset[str], messages: list[str]) -> Place:
    """Where `node` leads from `place`, noting names that lead nowhere on the way."""
    kind, children = node["type"], node["children"]
    if kind == "field":
        return _step_into(node["value"], place, steps, messages)
    if kind in ("subexpression", "index_expression", "pipe"):
        for child in children:
            place = _follow(child, place, steps, messages)
        return place
    if kind in ("current", "identity"):
        return place
    if kind in ("projection", "value_projection", "filter_projection"):
        _follow(children[0], place, steps, messages)
        for child in children[1:]:
            _follow(child, None, steps, messages)
    elif kind == "expref":
        _follow(children[0], None, steps, messages)
    elif kind not in ("literal", "index", "slice"):
        for child in children:
            _follow(child, place, steps, messages)
    return None


def _step_into(name: str, place: Place, steps: frozenset[str], messages: list[str]) -> Place:
    shown = _cut(name, 40)
    if place == () and name not in ROOT_NAMES:
        messages.append(
            f"unknown name {shown}: an expression starts from {', '.join(ROOT_NAMES)}; "
            f"a literal string is written \"'{shown}'\""
        )
    elif place == ("saga",) and name not in SAGA_FIELDS:
        messages.append(f"unknown name saga.{shown}; known: {', '.join(SAGA_FIELDS)}")
    elif place == ("steps",) and name not in steps:
        messages.append(f"unknown name steps.{shown}: no such step comes before this one")
    elif place is not None and len(place) == 2 and place[0] == "steps" and name != "response":
        messages.append(f"unknown name steps.{_cut(place[1], 40)}.{shown}; known: response")
    elif place is not None and (place == () or place in (("saga",), ("steps",))) and name != "payload":
        return (*place, name)
    return None


def _cut(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
