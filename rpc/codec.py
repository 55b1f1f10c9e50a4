"""A step's JSON object to the bytes of a gRPC message, and the answer's bytes back to a JSON object.

The request was checked by whoever made it; the answer is untrusted: whatever bytes come, `decode` returns a JSON object
that every store can keep, or raises `Lost`. Pure: no I/O.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, Protocol

import msgspec
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from rpc.outcomes import Lost, clean_text, in_doubt, not_done
from saga.model import Json

MAX_DEPTH = 100
"""How deep an answer may nest: protobuf's own limit for messages, and far below where any JSON reader breaks."""


class MessageCodec(Protocol):
    """Both ways between JSON objects and the messages of one method."""

    def encode(self, request: Json, *, strict: bool) -> bytes:
        """The request message. Raises `Lost` (not done, permanent) naming the field that does not fit."""
        ...

    def decode(self, body: bytes) -> Json:
        """The answer. Raises `Lost` (unknown, permanent): it was done, but what was said cannot be kept."""
        ...


class JsonCodec:
    """`codec: json`: the message is the JSON text."""

    def encode(self, request: Json, *, strict: bool) -> bytes:
        try:
            return msgspec.json.encode(request)
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            raise _unfit_request(f"the request cannot be written as JSON: {error}") from error

    def decode(self, body: bytes) -> Json:
        if not body:
            return {}  # as in protobuf, where an empty message has no bytes: an undo often has nothing to say
        try:
            answer = msgspec.json.decode(body)
        except RecursionError as error:
            raise _too_deep() from error
        except (msgspec.DecodeError, UnicodeDecodeError):
            answer = _decode_leniently(body)
        # Only these bytes can be the start of something `_storable` would change; most answers have none of them.
        suspicious = b"\\u0000" in body or b"\\ud" in body or b"\\uD" in body
        if suspicious or body.count(b"[") + body.count(b"{") > MAX_DEPTH:
            answer = _storable(answer)
        return _object(answer)


def _decode_leniently(body: bytes) -> Any:
    """What msgspec refuses and participants may still send: a lone surrogate in an escape."""
    try:
        return _storable(json.loads(body, parse_constant=_not_json))
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        raise in_doubt("INTERNAL", f"the answer is not JSON: {clean_text(str(error), 200)}", permanent=True) from error


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


class ProtobufCodec:
    """`codec: protobuf`: the canonical JSON mapping of one method's messages.

    Answers keep the field names of the proto and print fields without presence with their defaults, so that what
    `steps.<name>.response.<field>` means does not depend on its value.
    """

    def __init__(self, method: MethodDescriptor, pool: DescriptorPool) -> None:
        self._pool = pool
        self._request_name = method.input_type.full_name
        self._answer_name = method.output_type.full_name
        self._request_class = GetMessageClass(method.input_type)
        self._answer_class = GetMessageClass(method.output_type)
        if not _is_json_object(method.output_type):
            # Said before the call: afterwards the work would be done and its answer could not be kept.
            raise not_done(
                "UNIMPLEMENTED",
                f"{method.full_name} answers with {self._answer_name}, whose JSON form is not an object",
                permanent=True,
            )

    def encode(self, request: Json, *, strict: bool) -> bytes:
        message = self._request_class()
        try:
            json_format.ParseDict(request, message, ignore_unknown_fields=not strict, descriptor_pool=self._pool)
            return message.SerializeToString()
        # OverflowError: a whole number beyond every float, where the field is a float or a Struct.
        except (json_format.ParseError, ValueError, TypeError, RecursionError, AttributeError, OverflowError) as error:
            reason = "it nests too deep" if isinstance(error, RecursionError) else _fault(str(error))
            raise _unfit_request(f"the request does not fit {self._request_name}: {reason}") from error

    def decode(self, body: bytes) -> Json:
        try:
            answer = json_format.MessageToDict(
                self._answer_class.FromString(body),
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
                descriptor_pool=self._pool,
            )
        except RecursionError as error:
            raise _too_deep() from error
        except (DecodeError, json_format.Error, ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"the answer is not a {self._answer_name}: {clean_text(str(error), 200)}"
            raise in_doubt("INTERNAL", message, permanent=True) from error
        # A NUL can only be in a string if the byte is in the message; bytes fields come out as base64. Strings of
        # proto2 may hold any bytes, hence the look at what is not ASCII.
        if b"\0" in body or not body.isascii():
            answer = _storable(answer)
        return _object(answer)


_NO_OBJECT = frozenset(
    f"google.protobuf.{name}"
    for name in (
        *("BoolValue", "BytesValue", "DoubleValue", "Duration", "FieldMask", "FloatValue", "Int32Value"),
        *("Int64Value", "ListValue", "StringValue", "Timestamp", "UInt32Value", "UInt64Value"),
    )
)
"""Well-known types whose canonical JSON is never an object (`Value` may be one, `Struct`, `Any` and `Empty` are)."""


def _is_json_object(message: Descriptor) -> bool:
    return message.full_name not in _NO_OBJECT


def _object(answer: Any) -> Json:
    if not isinstance(answer, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(answer), "a number")
        raise in_doubt("INTERNAL", f"the answer is {kind}, not a JSON object", permanent=True)
    return answer


def _storable(value: Any, depth: int = 1) -> Any:
    """`value` with NUL and lone surrogates replaced by U+FFFD, keys included. Raises `Lost` for what JSON cannot hold
    (infinite numbers) and for nesting deeper than `MAX_DEPTH`."""
    if isinstance(value, str):
        return _storable_text(value)
    if isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, list):
            return [_storable(item, depth + 1) for item in value]
        return {_storable_text(key): _storable(item, depth + 1) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise in_doubt("INTERNAL", "the answer holds a number that JSON cannot hold", permanent=True)
    return value


def _storable_text(text: str) -> str:
    if "\0" in text:
        text = text.replace("\0", "�")
    if not text.isascii():
        # Surrogate pairs written as two escapes become the character they stand for; lone halves are replaced.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


_PLACE = re.compile(r"(?:Failed to parse \S+ field: )*")


def _fault(text: str) -> str:
    """protobuf's words for what does not fit, without the value in them, which may be one that is not to be shown."""
    place = _PLACE.match(text)
    end = 0 if place is None else place.end()
    if end and not text.startswith("Message type ", end):
        text = f"{text[:end]}its value does not fit"
    return clean_text(text)


def _unfit_request(message: str) -> Lost:
    return not_done("INVALID_ARGUMENT", message, permanent=True)


def _too_deep() -> Lost:
    return in_doubt("INTERNAL", f"the answer nests deeper than {MAX_DEPTH} levels", permanent=True)
