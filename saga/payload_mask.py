"""Fields of payloads that are not to be shown: `observability.redact`.

An entry without a dot is a key, masked wherever it stands; one with dots is a path from the root of a payload, a
request or an answer, and goes through the elements of lists by itself (`customer.cards.number`). Whatever the field
holds becomes `***`, its type too. What is stored, sent to participants and given to clients of the API stays whole.
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
            *way, last = field.split(".")
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
            if isinstance(found, dict):
                copy = holder[at] = dict(found)
                for key, inner in found.items():
                    if key in self._keys or key in place.masked:
                        copy[key] = MASK
                    elif isinstance(inner, dict | list):
                        left.append((copy, key, place.onward.get(key, _NOWHERE)))
            elif isinstance(found, list):
                copied = holder[at] = list(found)
                left += [
                    (copied, number, place) for number, inner in enumerate(found) if isinstance(inner, dict | list)
                ]
        return shown[0]

    def json(self, text: str) -> str:
        """The same of a JSON text."""
        if self._in_text is None:
            return text
        return msgspec.json.encode(self.value(msgspec.json.decode(text))).decode()

    def text(self, text: str) -> str:
        """Free text, such as what a participant says of an error: what stands behind the name of a field and `:` or
        `=` is masked. The last name of a path stands for it. As good as can be: text has no fields."""
        if self._in_text is None:
            return text
        return self._in_text.sub(rf"\g<name>{MASK}", text)


NOTHING = PayloadMask()


def _spellings(names: set[str]) -> re.Pattern[str]:
    # VERBOSE passes over blanks and #; re.escape guards those of names.
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(
        rf"""
        (?P<name>(?<!\w)(?:{"|".join(map(re.escape, longest_first))})\\?["']?\s{{0,8}}[:=]\s{{0,8}})
        (?: "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | [^\s,;&}}\])]+ )
        """,
        re.VERBOSE,
    )
