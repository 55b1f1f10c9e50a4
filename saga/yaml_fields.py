"""Takes the keys of a YAML map (`yaml_nodes.py`), each by the type and the bounds it must have, noting every fault."""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from saga.yaml_nodes import (
    Faults,
    Fields,
    Items,
    Kind,
    Mark,
    Node,
    Refused,
    Scalar,
    describe,
    describe_kind,
    join,
    kind_of,
    value_of,
)

INT32_MAX = 2**31 - 1

_T = TypeVar("_T")
_EnumT = TypeVar("_EnumT", bound=enum.StrEnum)


class _Required(enum.Enum):
    REQUIRED = 0


REQUIRED = _Required.REQUIRED
"""Instead of a default: the key must be there."""


class MapReader:
    """Takes the keys of one map, each by the type it must have.

    A method that finds a fault notes it and returns a value of the right type that means nothing: look at the faults
    before using any. A key that is null counts as absent where the key is optional. After the last key, `close`
    refuses those that nobody asked for.
    """

    def __init__(self, node: Node, path: str, faults: Faults) -> None:
        self.path = path
        self.faults = faults
        self.mark = node.mark
        self._asked: dict[str, None] = {}
        self._fields: dict[str, tuple[Mark, Node]] = {}
        self._usable = isinstance(node, Fields)
        if isinstance(node, Fields):
            self._fields = node.fields
        elif not isinstance(node, Refused):
            # Not the text: a URL with a password in it is what people write in place of a section.
            faults.note(path, "type", f"expected a map, got {describe_kind(node)}", node)

    def path_of(self, key: str) -> str:
        return join(self.path, key)

    def names(self) -> Sequence[str]:
        """The keys that are there."""
        return tuple(self._fields)

    def take(self, key: str, *, required: bool = False, null_is_absent: bool = True) -> Node | None:
        """The value of a key; None: it is absent (a fault, if it is required), or was refused already."""
        self._asked[key] = None
        found = self._fields.get(key)
        if found is None:
            if required and self._usable:
                self.faults.note(self.path_of(key), "missing", "is required", self.mark)
            return None
        node = found[1]
        if isinstance(node, Refused):
            return None
        if not required and null_is_absent and isinstance(node, Scalar) and kind_of(node) is Kind.NULL:
            # A password that happens to be `null` is one; a variable that is empty is as good as none.
            return node if node.source is not None and node.text else None
        return node

    def close(self) -> None:
        """Notes every key that was not asked for, with the nearest one that was."""
        for key, (mark, _) in self._fields.items():
            if key in self._asked:
                continue
            # Comparing is slow; where the fault will not be listed, or the key is no slip of the pen, it is left out.
            compare = len(key) <= 64 and not self.faults.full
            near = difflib.get_close_matches(key, self._asked, n=1) if compare else []
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(self._asked))}"
            self.faults.note(self.path_of(key), "unknown_key", f"unknown key; {hint}", mark)

    def refuse(self, key: str, reason: str, message: str) -> None:
        """Notes a fault of a key's value."""
        found = self._fields.get(key)
        self.faults.note(self.path_of(key), reason, message, found[1] if found is not None else self.mark)

    def string(
        self,
        key: str,
        default: str | _Required = REQUIRED,
        *,
        max_chars: int = 255,
        matching: re.Pattern[str] | None = None,
        expected: str | None = None,
        printable: bool = False,
        secret: bool = False,
    ) -> str:
        """Text of 1 to `max_chars` characters without control characters, and of the form `matching` if given.
        `expected` words that form. `printable`: nor others that leave no mark. `secret`: the value is not shown."""
        node = self.take(key, required=default is REQUIRED)
        if node is None:
            return "" if default is REQUIRED else default
        return read_string(
            node,
            self.path_of(key),
            self.faults,
            max_chars=max_chars,
            matching=matching,
            expected=expected,
            printable=printable,
            secret=secret,
        )

    def optional_string(self, key: str, **how: Any) -> str | None:
        """As `string`; None when absent."""
        return None if self.take(key) is None else self.string(key, **how)

    def integer(self, key: str, default: int | _Required = REQUIRED, *, low: int, high: int = INT32_MAX) -> int:
        value = self.optional_integer(key, low=low, high=high, required=default is REQUIRED)
        if value is None:
            return low if default is REQUIRED else default
        return value

    def optional_integer(self, key: str, *, low: int, high: int = INT32_MAX, required: bool = False) -> int | None:
        node = self.take(key, required=required)
        if node is None:
            return None
        wanted = f"int >= {low}" if high == INT32_MAX else f"int from {low} to {high}"
        value = self._typed(key, node, (Kind.INT,), wanted)
        if not isinstance(value, int):
            return None
        if not low <= value <= high:
            if value > high and high == INT32_MAX:
                wanted = f"int from {low} to {high}"
            self.refuse(key, "range", f"expected {wanted}, got {describe(node)}")
        return value

    def number(
        self, key: str, default: float | _Required = REQUIRED, *, low: float, high: float, above_low: bool = False
    ) -> float:
        """A finite number from `low` (`above_low`: without it) to `high`, as a float."""
        value = self.optional_number(key, low=low, high=high, above_low=above_low, required=default is REQUIRED)
        if value is None:
            return low if default is REQUIRED else default
        return value

    def optional_number(
        self, key: str, *, low: float, high: float, above_low: bool = False, required: bool = False
    ) -> float | None:
        node = self.take(key, required=required)
        if node is None:
            return None
        wanted = f"number > {low:g}" if above_low else f"number from {low:g} to {high:.0f}"
        value = self._typed(key, node, (Kind.INT, Kind.FLOAT), wanted)
        if not isinstance(value, int | float):
            return None
        if value < low or (above_low and value == low):
            self.refuse(key, "range", f"expected {wanted}, got {describe(node)}")
        elif value > high:
            self.refuse(
                key, "range", f"expected {wanted}{f' and <= {high:.0f}' if above_low else ''}, got {describe(node)}"
            )
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        node = self.take(key)
        if node is None:
            return default
        return bool(self._typed(key, node, (Kind.BOOL,), "true or false"))

    def choice(self, key: str, options: type[_EnumT], default: _EnumT) -> _EnumT:
        """One of the words of an enum."""
        node = self.take(key)
        if node is None:
            return default
        words = [option.value for option in options]
        if isinstance(node, Scalar) and node.text in words:
            return options(node.text)
        self.refuse(key, "value", f"expected {' or '.join(words)}, got {describe(node)}")
        return default

    def section(self, key: str) -> MapReader | None:
        """A map under a key, to be read in its turn; None when absent."""
        node = self.take(key)
        return None if node is None else MapReader(node, self.path_of(key), self.faults)

    def each(self, key: str, read: Callable[[Node, str], _T], *, required: bool = False, at_least: int = 0) -> list[_T]:
        """What `read` makes of each item of a list, given the item and its path."""
        node = self.take(key, required=required)
        if node is None:
            return []
        if not isinstance(node, Items):
            self.refuse(key, "type", f"expected a list, got {describe(node)}")
            return []
        if len(node.items) < at_least:
            self.refuse(key, "range", f"expected {at_least} or more items, got {len(node.items)}")
        path = self.path_of(key)
        return [read(item, f"{path}[{index}]") for index, item in enumerate(node.items)]

    def _typed(self, key: str, node: Node, kinds: Collection[Kind], wanted: str) -> Any:
        if isinstance(node, Scalar) and kind_of(node) in kinds:
            return value_of(node)
        self.refuse(key, "type", f"expected {wanted}, got {describe(node)}")
        return None


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def read_string(
    node: Node,
    path: str,
    faults: Faults,
    *,
    max_chars: int = 255,
    matching: re.Pattern[str] | None = None,
    expected: str | None = None,
    printable: bool = False,
    secret: bool = False,
) -> str:
    """One string; see `MapReader.string`."""
    wanted = expected or f"string of 1 to {max_chars} characters"
    shown = "a value that is not shown" if secret else None
    if isinstance(node, Refused):
        return ""
    if not isinstance(node, Scalar) or (node.source is None and kind_of(node) is not Kind.STRING):
        got = shown if shown is not None and isinstance(node, Scalar) else describe(node)
        hint = "; put it in quotes" if isinstance(node, Scalar) and kind_of(node) is not Kind.NULL else ""
        faults.note(path, "type", f"expected {wanted}, got {got}{hint}", node)
        return ""
    text = node.text
    if not 1 <= len(text) <= max_chars:
        faults.note(path, "range", f"expected string of 1 to {max_chars} characters, got {len(text)}", node)
    elif _CONTROL.search(text):
        faults.note(path, "value", f"expected {wanted}, got control characters in it", node)
    elif printable and not text.isprintable():
        faults.note(path, "value", f"expected {wanted}, got characters in it that do not print", node)
    elif matching is not None and not matching.fullmatch(text):
        faults.note(path, "value", f"expected {wanted}, got {shown or describe(node)}", node)
    return text
