"""Metadata values and deadlines as they are written on the wire."""

from __future__ import annotations

import math
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.metadata import MAX_VALUE_BYTES, encode_timeout, encode_value, metadata_of
from tests.rpc.calling import step


@given(st.text(max_size=60))
def test_any_text_is_printable_ascii_and_decodes_to_itself(text: str) -> None:
    written = encode_value(text)
    assert written.isascii()
    assert written.isprintable()
    assert written == written.strip()
    assert unquote(written) == text.encode("utf-8", "replace").decode()


@given(st.text(st.characters(), max_size=2000))
def test_no_value_is_over_the_limit_or_ends_in_half_an_escape(text: str) -> None:
    written = encode_value(text)
    assert len(written) <= MAX_VALUE_BYTES
    assert "%" not in written[-2:]


def test_plain_names_are_sent_as_they_are() -> None:
    assert encode_value("order-processing v2 (EU)") == "order-processing v2 (EU)"


def test_a_lone_surrogate_and_a_line_break_cannot_be_injected() -> None:
    assert encode_value("a\r\nx-evil: 1") == "a%0D%0Ax-evil: 1"
    assert encode_value("\ud800") == "?"


def test_the_names_of_the_contract_are_sent() -> None:
    names = [name for name, _ in metadata_of(step(correlation_id="c-1"))]
    assert names == [
        "saga-id",
        "saga-workflow",
        "saga-step",
        "saga-action",
        "saga-attempt",
        "saga-epoch",
        "idempotency-key",
        "x-correlation-id",
        "traceparent",
    ]


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.0001, "1m"),
        (0.25, "250m"),
        (30, "30000m"),
        (99_999.999, "99999999m"),
        (100_000, "100000S"),
        (1e12, "99999999S"),
        (math.inf, "99999999S"),
    ],
)
def test_deadlines_have_at_most_eight_digits(seconds: float, written: str) -> None:
    assert encode_timeout(seconds) == written
