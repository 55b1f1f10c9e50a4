"""Reading a query string or a JSON body into one of the types of `schema.py`, with every fault at once.

msgspec alone would stop at the first field at fault; here each field is converted by itself and the faults are
collected as `saga.errors.Detail`s.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec

from saga.errors import Detail, Invalid
from saga.json_bounds import TOO_LARGE, place_of_number_out_of_range

T = TypeVar("T", bound=msgspec.Struct)

MAX_QUERY_FIELDS = 100

_KINDS = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


class _Field(msgspec.Struct, frozen=True):
    name: str
    type: Any
    required: bool
    expected: str


def parse_query(raw: bytes, into: type[T]) -> T:
    """The query string as `into`. `Invalid`: with every parameter that is unknown, repeated or no value of its type."""
    faults: list[Detail] = []
    values: dict[str, Any] = {}
    fields = _fields(into)
    for name, text in _pairs(raw):
        shown = name if name.isprintable() and len(name) <= 64 else "?"
        if name not in fields:
            known = ", ".join(fields) or "none"
            faults.append(Detail(field=shown, reason="unknown", message=f"unknown parameter; known: {known}"))
        elif name in values:
            faults.append(Detail(field=shown, reason="repeated", message="given more than once"))
        else:
            field = fields[name]
            try:
                values[name] = _from_text(text, field.type)
            except (msgspec.ValidationError, OverflowError):
                values[name] = None
                message = f"expected {field.expected}, got {text[:64]!r}"
                faults.append(Detail(field=name, reason="invalid", message=message))
    refuse_if_faulty(faults)
    return into(**values)


def parse_body(data: bytes, content_type: str | None, into: type[T]) -> T:
    """The JSON body as `into`. `Invalid`: no JSON object, or with each field that is missing, unknown or mistyped."""
    value = _json(data, content_type)
    if not isinstance(value, dict):
        _refuse("", "type", f"expected a JSON object, got {_KINDS[type(value)]}")
    faults: list[Detail] = []
    values: dict[str, Any] = {}
    fields = _fields(into)
    for name, field in fields.items():
        if name not in value:
            if field.required:
                faults.append(Detail(field=name, reason="required", message=f"expected {field.expected}, got nothing"))
            continue
        try:
            values[name] = msgspec.convert(value[name], field.type)
        except msgspec.ValidationError:
            message = f"expected {field.expected}, got {_KINDS[type(value[name])]}"
            faults.append(Detail(field=name, reason="type", message=message))
    for name in value.keys() - fields.keys():
        message = f"unknown field; known: {', '.join(fields)}"
        faults.append(Detail(field=name[:64], reason="unknown", message=message))
    refuse_if_faulty(faults)
    return into(**values)


def _from_text(text: str, type_: Any) -> Any:
    """Text as a value of `type_`; None is no value that can be written in a query."""
    inner = _unwrapped(type_)
    base = get_args(inner)[0] if get_origin(inner) is Annotated else inner
    if base is int and not text.removeprefix("-").isdecimal():
        raise OverflowError  # msgspec would take 1e2 and 1.0 too
    value = msgspec.convert(text, inner, strict=base not in (int, float))
    # An instant of year 1 or 9999 may leave the calendar when its offset is taken off.
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def _unwrapped(type_: Any) -> Any:
    """The type without its None, with the constraints that bind the rest."""
    inner = get_args(type_)[0] if get_origin(type_) is Annotated else type_
    if type(None) not in get_args(inner):
        return type_
    return next(arm for arm in get_args(inner) if arm is not type(None))


def refuse_if_faulty(faults: list[Detail]) -> None:
    """Raises `Invalid` if there is a fault."""
    if faults:
        told = "; ".join(f"{fault.field}: {fault.message}" if fault.field else fault.message for fault in faults[:10])
        raise Invalid(told, tuple(faults))


def _refuse(field: str, reason: str, message: str) -> None:
    refuse_if_faulty([Detail(field=field, reason=reason, message=message)])


def _pairs(raw: bytes) -> list[tuple[str, str]]:
    if not raw:
        return []
    try:
        return parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
    except ValueError:  # also UnicodeDecodeError
        _refuse("", "malformed", f"the query is no UTF-8 or has over {MAX_QUERY_FIELDS} parameters")
        raise AssertionError("unreachable") from None


def _json(data: bytes, content_type: str | None) -> Any:
    if content_type is not None:
        media = content_type.partition(";")[0].strip().lower()
        if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
            _refuse("Content-Type", "unsupported", f"expected application/json, got {content_type[:64]}")
    if not data:
        _refuse("", "required", "expected a JSON object, got an empty body")
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        _refuse("", "too_deep", "the JSON is nested too deep")
    except UnicodeDecodeError:
        _refuse("", "malformed", "the body is no UTF-8")
    except msgspec.MsgspecError as error:
        if place := place_of_number_out_of_range(data):
            _refuse(place, "out_of_range", TOO_LARGE)
        _refuse("", "malformed", f"the body is no JSON: {error}")


@cache
def _fields(struct: type[msgspec.Struct]) -> dict[str, _Field]:
    return {
        info.name: _Field(info.name, info.type, info.required, _expected(info.type))
        for info in msgspec.structs.fields(struct)
    }


def _expected(type_: Any) -> str:
    """What to tell a client it should have sent."""
    if get_origin(type_) is Annotated:
        for meta in get_args(type_)[1:]:
            if isinstance(meta, msgspec.Meta) and meta.extra and "expected" in meta.extra:
                return str(meta.extra["expected"])
    inner = _unwrapped(type_)
    if inner is not type_:
        return _expected(inner)
    if get_origin(type_) is Annotated:
        return _expected(get_args(type_)[0])
    return _KINDS.get(get_origin(type_) or type_, "value")
