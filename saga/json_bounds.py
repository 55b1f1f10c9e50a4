"""What a JSON object from a client has to keep to, before it is stored and sent on: one rule for payloads and for
corrected requests."""

from __future__ import annotations

import json
from math import isinf
from typing import Any

import msgspec

from saga.errors import Detail, Invalid, PayloadTooLarge
from saga.model import Json
from saga.yaml_nodes import cut, join

MAX_DEPTH = 100
"""Levels of objects and lists: what protobuf's JSON mapping, the next to read it, accepts."""


def encode_within_bounds(field: str, value: Json, max_bytes: int, faults: list[Detail]) -> bytes:
    """The object as JSON; U+0000 in a string, which no JSON column holds, is one more fault.

    `Invalid`: it cannot be written as JSON, or is nested too deep. `PayloadTooLarge`. Each names `field`.
    """
    try:
        body = msgspec.json.encode(value)
    except RecursionError:
        body = b"{" * (MAX_DEPTH + 1)
    except (UnicodeEncodeError, OverflowError, TypeError, ValueError) as error:
        message = f"cannot be written as JSON: {error}"
        raise Invalid(f"{field} {message}", (Detail(field=field, reason="not_json", message=message),)) from None
    # Brackets bound the depth from above, so that an ordinary payload costs two counts and no walk.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        message = f"nested deeper than {MAX_DEPTH} levels"
        raise Invalid(f"{field} is {message}", (Detail(field=field, reason="too_deep", message=message),))
    if len(body) > max_bytes:
        raise PayloadTooLarge(
            f"{field} is {len(body)} bytes, the limit is {max_bytes}",
            (Detail(field=field, reason="too_large", message=f"at most {max_bytes} bytes"),),
        )
    if b"\\u0000" in body and _has_nul(value):
        faults.append(Detail(field=field, reason="nul_character", message="U+0000 cannot be stored in a JSON string"))
    return body


TOO_LARGE = "the number is larger than can be kept"
MOST_SEARCHED_BYTES = 64 * 1024
"""Of a text in which the place of such a number is looked for: it is read once more, and by hand, which would hold up
everybody else for as long as a second."""
MAX_DIGITS = 4300
"""Of a whole number, its sign counted; Python's own limit, which msgspec keeps to."""
_MARK = object()
"""Stands for such a number."""


def place_of_number_out_of_range(data: bytes) -> str:
    """Where the first number stands that is too large in a JSON text that msgspec refused, as `payload.items[1].price`:
    msgspec itself tells of keys only that they are some. Empty: there is none, the text is no JSON anyway, or it is
    longer than `MOST_SEARCHED_BYTES`."""
    if len(data) > MOST_SEARCHED_BYTES:
        return ""
    try:
        value = json.loads(data, parse_float=lambda text: _MARK if isinf(float(text)) else 0, parse_int=_int)
    except (ValueError, RecursionError):
        return ""
    # The way to a value is kept as its last step and the way to there: as texts they could be far larger than the body.
    left: list[tuple[Any, Any]] = [((), value)]
    while left:
        way, found = left.pop()
        if found is _MARK:
            return _written(way)
        inner = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        left += [((way, step), below) for step, below in reversed([*inner])]
    return ""


def _int(digits: str) -> object:
    return _MARK if len(digits) > MAX_DIGITS else 0


def _written(way: Any) -> str:
    steps = []
    while way:
        way, step = way
        steps.append(step)
    path = ""
    for step in reversed(steps):
        path = join(path, step) if isinstance(step, str) else f"{path}[{step}]"
    # A lone surrogate in a key is nothing that can be told.
    return cut(path.encode("utf-8", "replace").decode())


def _is_deeper(value: object, limit: int) -> bool:
    """Without recursion, since the value may be as deep as a hostile caller likes."""
    level = [value]
    for _ in range(limit):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\x00" in value
    if isinstance(value, dict):
        return any(_has_nul(key) or _has_nul(item) for key, item in value.items())
    if isinstance(value, list):
        return any(_has_nul(item) for item in value)
    return False
