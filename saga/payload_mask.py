"""Fields of payloads that are not to be shown: `observability.redact`.

An entry without a dot is a key, masked wherever it stands; one with dots is a path from the root of a payload, a
request or an answer, and goes through the elements of lists by itself (`customer.cards.number`). Case, underscores and
hyphens do not part names, for protobuf's JSON takes `cardNumber` for `card_number`, and either may be in a payload.
Whatever the field holds becomes `***`, its type too. A text in a payload is masked as free text is, for there may be
JSON in it. What is stored, sent to participants and given to clients of the API stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

MASK = "***"


class _Place:
    """A place in a payload to which paths lead: which of its keys are masked, and which lead on."""

    __slots__ = ("masked", "onward")

    def __init__(self) -> None:
        self.masked: set[str] = set()
        self.onward: dict[str, _Place] = {}


_NOWHERE = _Place()


class PayloadMask:
    """Compiled once; false, and free of cost, where nothing is to be masked."""

    def __init__(self, fields: Iterable[str] = ()) -> None:
        self._keys: set[str] = set()
        self._root = _Place()
        names: set[str] = set()
        for field in fields:
            *way, last = map(_folded, field.split("."))
            names.add(last)
            if not way:
                self._keys.add(last)
                continue
            place = self._root
            for key in way:
                place = place.onward.setdefault(key, _Place())
            place.masked.add(last)
        self._in_text = _spellings(names) if names else None

    def __bool__(self) -> bool:
        return self._in_text is not None

    def value(self, value: Any) -> Any:
        """A decoded JSON value without what is not to be shown; the value itself is left as it is. Not recursive:
        answers of participants may be nested deeper than this language likes."""
        if self._in_text is None:
            return value
        shown: list[Any] = [value]
        left: list[tuple[Any, Any, _Place]] = [(shown, 0, self._root)]
        while left:
            holder, at, place = left.pop()
            found = holder[at]
            if isinstance(found, str):
                holder[at] = self.text(found)
            elif isinstance(found, dict):
                copy = holder[at] = dict(found)
                for key, inner in found.items():
                    name = _folded(key)
                    if name in self._keys or name in place.masked:
                        copy[key] = MASK
                    elif isinstance(inner, dict | list | str):
                        left.append((copy, key, place.onward.get(name, _NOWHERE)))
            elif isinstance(found, list):
                copied = holder[at] = list(found)
                left += [
                    (copied, number, place)
                    for number, inner in enumerate(found)
                    if isinstance(inner, dict | list | str)
                ]
        return shown[0]

    def json(self, text: str) -> str:
        """The same of a JSON text."""
        if self._in_text is None:
            return text
        return msgspec.json.encode(self.value(msgspec.json.decode(text))).decode()

    def text(self, text: str) -> str:
        """Free text, such as what a participant says of an error: what stands behind the name of a field and `:` or
        `=` is masked, up to the end of quotes and brackets. The last name of a path stands for it. As good as can be:
        text has no fields."""
        if self._in_text is None:
            return text
        shown: list[str] = []
        at = 0
        for name in self._in_text.finditer(text):
            if name.start() < at:
                continue  # within what is masked
            end = _end_of_value(text, name.end())
            if end > name.end():
                shown += (text[at : name.end()], MASK)
                at = end
        return "".join((*shown, text[at:]))


NOTHING = PayloadMask()


def _folded(name: str) -> str:
    """What the spellings of a name have in common."""
    return name.replace("_", "").replace("-", "").lower() or name


def _spellings(names: set[str]) -> re.Pattern[str]:
    # VERBOSE passes over blanks and #; re.escape guards those of names.
    longest_first = sorted(names, key=len, reverse=True)
    spelled = ("[_-]*".join(map(re.escape, name)) for name in longest_first)
    return re.compile(
        rf"""
        (?<!\w)_*(?:{"|".join(spelled)})_*                     # a name
        \\*["']?                                               # its quotes, escaped where JSON is in a string of JSON
        \s{{0,8}}(?:[:=]\s{{0,8}}|(?={{))                      # protobuf's text has nothing before a message
        """,
        re.IGNORECASE | re.VERBOSE,
    )


_VALUE = re.compile(r"""(?P<quote>\\*["']).*?(?:(?<!\\)(?P=quote)|\Z)|[^\s,;&}\])]+(?:(?<=\d)[ ]\d+)*""", re.DOTALL)
"""A quoted text, or a word; digits that are written in groups, as those of a card, are one."""
_BRACKET = re.compile(
    r"""(?P<quote>\\*+["']).*?(?:(?<!\\)(?P=quote)|\Z)|\\++|(?P<open>[{\[])|(?P<close>[}\]])""", re.DOTALL
)
"""A quoted text, whose brackets are none; a run of backslashes as a whole, for each of them would look for its end."""


def _end_of_value(text: str, start: int) -> int:
    """Where the value that begins at `start` ends; what is never closed goes on to the end of the text."""
    if text[start : start + 1] not in ("{", "["):
        value = _VALUE.match(text, start)
        return start if value is None else value.end()
    depth = 0
    for found in _BRACKET.finditer(text, start):
        depth += (found["open"] is not None) - (found["close"] is not None)
        if depth == 0 and found["close"] is not None:
            return found.end()
    return len(text)
