"""Fields of payloads that are not to be shown, against a plain recursive reading of the same rules."""

from __future__ import annotations

import copy
import re
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saga.payload_mask import MASK, NOTHING, PayloadMask

KEYS = st.sampled_from(["a", "b", "c", "card", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["", "secret", "4111"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=20,
)
NAMES = st.sampled_from(["a", "b", "c", "card"])
FIELDS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map(".".join), max_size=4)


def plainly(value: Any, fields: list[str], way: tuple[str, ...] = ()) -> Any:
    """What the module says of itself, word by word."""
    if isinstance(value, list):
        return [plainly(inner, fields, way) for inner in value]
    if not isinstance(value, dict):
        return value
    shown = {}
    for key, inner in value.items():
        here = (*way, key)
        hidden = any(field == key if "." not in field else tuple(field.split(".")) == here for field in fields)
        shown[key] = MASK if hidden else plainly(inner, fields, here)
    return shown


@given(VALUES, FIELDS)
def test_a_value_is_shown_as_the_rules_say_and_stays_what_it_was(value: Any, fields: list[str]) -> None:
    before = copy.deepcopy(value)
    mask = PayloadMask(fields)
    shown = mask.value(value)
    assert shown == plainly(value, fields)
    assert value == before
    assert mask.value(shown) == shown
    assert msgspec.json.decode(mask.json(msgspec.json.encode(value).decode())) == shown


@given(VALUES, NAMES)
def test_a_key_is_shown_nowhere(value: Any, name: str) -> None:
    def found(shown: Any) -> list[Any]:
        if isinstance(shown, list):
            return [one for inner in shown for one in found(inner)]
        if isinstance(shown, dict):
            return [one for key, inner in shown.items() for one in ([inner] if key == name else found(inner))]
        return []

    assert all(one == MASK for one in found(PayloadMask([name]).value(value)))


def test_a_path_goes_through_lists_and_a_key_through_everything() -> None:
    payload = {
        "customer": {"cards": [{"number": 1, "name": "x"}, [{"number": 2}]], "number": 3},
        "number": 4,
        "notes": [{"iban": "DE1", "deep": {"iban": None}}],
    }
    assert PayloadMask(["customer.cards.number", "iban"]).value(payload) == {
        "customer": {"cards": [{"number": MASK, "name": "x"}, [{"number": MASK}]], "number": 3},
        "number": 4,
        "notes": [{"iban": MASK, "deep": {"iban": MASK}}],
    }


def test_without_fields_nothing_is_copied() -> None:
    payload = {"a": [1]}
    assert PayloadMask().value(payload) is payload
    assert NOTHING.json(text := '{"a": 1}') is text
    assert NOTHING.text(text) is text
    assert not NOTHING
    assert PayloadMask(["a"])


def test_an_answer_may_be_nested_deeper_than_a_call_may_be() -> None:
    deep: Any = {"card": 1}
    for _ in range(50_000):
        deep = {"a": [deep]}
    shown = PayloadMask(["card"]).value(deep)
    for _ in range(50_000):
        (shown,) = shown["a"]
    assert shown == {"card": MASK}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"card": "41 11", "a": 1}', '{"card": ***, "a": 1}'),
        ('{"card":4111}', '{"card":***}'),
        ("{'card': 'it\\'s', 'b': 2}", "{'card': ***, 'b': 2}"),
        ('"{\\"card\\": 4111}"', '"{\\"card\\": ***}"'),
        ("refused: card=4111, amount=5", "refused: card=***, amount=5"),
        ("card: 4111", "card: ***"),
        ("postcard=blue discard: x cards=3", "postcard=blue discard: x cards=3"),
        ("no card was given", "no card was given"),
        ('card="never ends', "card=***"),
        ("house number=12", "house number=***"),
        ('{"Card": "4111", "CARD": "4112", "_card": 1}', '{"Card": ***, "CARD": ***, "_card": ***}'),
        ("pinCode=12 pin_code: 12 PinCode:12 spincode=1", "pinCode=*** pin_code: *** PinCode:*** spincode=1"),
        ('{"card": {"no": "4111", "of": ["x}"]}, "a": 1}', '{"card": ***, "a": 1}'),
        ('{"card": ["4111", "4112"], "a": [1]}', '{"card": ***, "a": [1]}'),
        ('"{\\"card\\": \\"41 11\\", \\"a\\": 1}"', '"{\\"card\\": ***, \\"a\\": 1}"'),
        ('"{\\"card\\": {\\"no\\": \\"41 11\\"}, \\"a\\": 1}"', '"{\\"card\\": ***, \\"a\\": 1}"'),
        ('{"card": {"no": "41', '{"card": ***'),
        ("card={'card': 1}, card=2", "card=***, card=***"),
        ('card { no: "4111" } amount { no: 5 }', "card *** amount { no: 5 }"),
        ('"{\\"card\\": {\\"no\\": \\"4}11\\"}, \\"a\\": 1}"', '"{\\"card\\": ***, \\"a\\": 1}"'),
        ("card: card=", "card: ***"),
        ("card=", "card="),
    ],
)
def test_in_text_what_stands_behind_a_name_is_hidden(text: str, shown: str) -> None:
    assert PayloadMask(["card", "address.number", "pin_code"]).text(text) == shown


def test_case_underscores_and_hyphens_do_not_part_names() -> None:
    payload = {
        "cardNumber": 1,
        "card_number": 2,
        "card-number": 3,
        "CARD_NUMBER": 3,
        "cardnumbers": 4,
        "Bill_To": {"zip_Code": 5, "z": 6},
    }
    for name, path in (("card_number", "bill_to.zip_code"), ("cardNumber", "billTo.zipCode")):
        assert PayloadMask([name, path]).value(payload) == {
            **dict.fromkeys(("cardNumber", "card_number", "card-number", "CARD_NUMBER"), MASK),
            "cardnumbers": 4,
            "Bill_To": {"zip_Code": MASK, "z": 6},
        }
    assert PayloadMask(["_"]).value({"_": 1, "": 2}) == {"_": MASK, "": 2}


def test_a_name_with_signs_in_it_is_a_name() -> None:
    assert PayloadMask(["a#b", "c d", "e(f"]).text("a#b=1 e(f: 2") == "a#b=*** e(f: ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("declined, card=4111 1111 1111 1111 of Ada", "declined, card=*** of Ada"),
        ("card: 4111 1111, amount=3 lamps", "card: ***, amount=3 lamps"),
        ("card-number=4111-1111-1111", "card-number=***"),
    ],
)
def test_digits_in_groups_are_one_value(text: str, shown: str) -> None:
    assert PayloadMask(["card", "card_number"]).text(text) == shown


@pytest.mark.parametrize(
    ("inner", "shown"),
    [
        ({"card": "4111", "pin": 12, "a": 1}, {"card": MASK, "pin": MASK, "a": 1}),
        ({"of": [{"card": {"no": "4}11"}}], "a": "x"}, {"of": [{"card": MASK}], "a": "x"}),
        ({"cardless": "4111", "a": "pin"}, {"cardless": "4111", "a": "pin"}),
    ],
)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_json_in_a_text_of_a_payload_hides_the_same_fields_however_often_it_is_quoted(
    times: int, inner: dict[str, Any], shown: dict[str, Any]
) -> None:
    def quoted(value: Any) -> Any:
        for _ in range(times):
            value = msgspec.json.encode(value).decode()
        return value

    mask = PayloadMask(["card", "customer.pin"])
    told = mask.value({"body": quoted(inner), "parts": [quoted(inner)]})
    expected = re.sub(r'\\*"\*\*\*\\*"', MASK, quoted(shown))
    assert told == {"body": expected, "parts": [expected]}
    assert mask.value(quoted(inner)) == expected


@pytest.mark.parametrize(
    ("start", "then"),
    [
        ("", "\\"),
        ("", '"'),
        ("", '\\"'),
        ("", "card="),
        ("", "card={"),
        ("", "card "),
        ("", "card" + "\\" * 50),
        ("", "c-"),
        ("card", "\\"),
        ("card", "_"),
        ('card="', "\\"),
        ("card={", "\\"),
        ("card={", "\\x"),
        ("card={", '"\\'),
    ],
)
def test_a_megabyte_that_is_made_to_be_slow_is_not(start: str, then: str) -> None:
    text = start + then * (1_000_000 // len(then))
    began = time.process_time()
    PayloadMask(["card", "pin_code"]).value({"a": text})
    assert time.process_time() - began < 20  # a cost that grows with its square would be many minutes
