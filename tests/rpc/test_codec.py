"""Answers of untrusted participants: kept as every store can keep them, or in doubt; never an error of another kind."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.codec import MAX_DEPTH, JsonCodec, MessageCodec, ProtobufCodec
from rpc.outcomes import Lost
from rpc.reflection import Catalog, catalog_from_descriptor_set
from saga.ports import Outcome
from tests.support.participants import compiled

CODEC = JsonCodec()


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return catalog_from_descriptor_set(compiled("shop.proto"))


@pytest.fixture(scope="module")
def reserve(catalog: Catalog) -> ProtobufCodec:
    return ProtobufCodec(catalog.method("shop.v1.Inventory.Reserve"), catalog.pool)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def assert_storable(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    assert "\\u0000" not in text
    assert depth_of(value) <= MAX_DEPTH


def assert_kept_or_in_doubt(codec: MessageCodec, body: bytes) -> None:
    try:
        answer = codec.decode(body)
    except Lost as lost:
        outcome = lost.outcome
        assert outcome is Outcome.UNKNOWN, lost  # noqa: PT017  (either way of ending is right)
    else:
        assert_storable(answer)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"a":"x\\u0000y"}', {"a": "x�y"}),
        (b'{"\\u0000":1}', {"�": 1}),
        (b'{"a":"\\ud800"}', {"a": "�"}),
        (b'{"a":"\\uD83D\\uDE00"}', {"a": "😀"}),
        (b'{"a":[{"b":"\\udfff"}]}', {"a": [{"b": "�"}]}),
        (b' {"a": 1e2} ', {"a": 100.0}),
        (b'{"a":"[[[[[{{{{{"}', {"a": "[[[[[{{{{{"}),
    ],
)
def test_what_can_be_kept_is_kept(body: bytes, kept: dict[str, Any]) -> None:
    assert CODEC.decode(body) == kept


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"3",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":"\xff"}',
        b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a":' * 101 + b"1" + b"}" * 101,
        b'{"a":"\\ud800",' + b'"b":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"a":' + b"9" * 10_000 + b',"b":"\\ud800"}',
    ],
)
def test_what_cannot_be_kept_is_in_doubt_for_good(body: bytes) -> None:
    with pytest.raises(Lost) as caught:
        CODEC.decode(body)
    assert (caught.value.outcome, caught.value.permanent) == (Outcome.UNKNOWN, True)


def test_an_empty_answer_is_an_empty_object() -> None:
    assert CODEC.decode(b"") == {}


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: json.dumps({"a": text}).encode()))
def test_any_bytes_are_kept_or_in_doubt(body: bytes) -> None:
    assert_kept_or_in_doubt(CODEC, body)


@given(st.binary(max_size=200))
def test_any_bytes_as_protobuf_are_kept_or_in_doubt(reserve: ProtobufCodec, body: bytes) -> None:
    assert_kept_or_in_doubt(reserve, body)


def test_a_deep_struct_in_a_protobuf_answer_is_in_doubt(reserve: ProtobufCodec) -> None:
    value: Any = 1
    for _ in range(40):
        value = {"a": value}
    encoded = reserve.encode({"order_id": "o", "extra": value}, strict=True)
    assert encoded
    deep: Any = 1
    for _ in range(3000):
        deep = {"a": deep}
    with pytest.raises(Lost) as caught:
        reserve.encode({"extra": deep}, strict=True)
    assert (caught.value.outcome, caught.value.code) == (Outcome.NOT_DONE, "INVALID_ARGUMENT")


def test_a_number_beyond_every_float_does_not_fit_where_floats_are(reserve: ProtobufCodec) -> None:
    for strict in (False, True):
        with pytest.raises(Lost) as caught:
            reserve.encode({"extra": {"a": [10**400]}}, strict=strict)
        assert (caught.value.outcome, caught.value.code) == (Outcome.NOT_DONE, "INVALID_ARGUMENT")
        assert caught.value.permanent


def test_requests_json_cannot_hold_are_not_sent() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    for request in (endless, {"a": object()}):
        with pytest.raises(Lost) as caught:
            CODEC.encode(request, strict=False)
        assert (caught.value.outcome, caught.value.permanent) == (Outcome.NOT_DONE, True)


def test_numbers_survive_the_json_codec() -> None:
    numbers = {"big": 2**53 + 1, "small": -1, "half": 0.5, "most": 2**63 - 1}
    assert CODEC.decode(CODEC.encode(numbers, strict=False)) == numbers
    assert not math.isnan(CODEC.decode(b'{"a":1.7976931348623157e308}')["a"])


def test_what_does_not_fit_is_told_by_its_place_and_not_by_its_value(reserve: ProtobufCodec) -> None:
    for value in ("SECRET", {"a": "SECRET"}, ["SECRET"]):
        with pytest.raises(Lost) as caught:
            reserve.encode({"at": value, "lines": []}, strict=True)
        assert "Failed to parse at field: its value does not fit" in str(caught.value)
        assert "SECRET" not in str(caught.value)
