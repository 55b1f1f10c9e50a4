"""Calling participants that behave: both server libraries, both codecs, what they see and what comes back."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
import trio

from rpc.settings import ServiceSettings
from saga.model import StepAction
from saga.ports import Answer, Outcome
from tests.rpc.calling import calling, step
from tests.support.participants import Codec, Flavour, Participant, compiled, participant


@pytest.fixture(scope="module", params=["grpcio", "grpclib"])
def shop(request: pytest.FixtureRequest) -> Iterator[Participant]:
    """A protobuf participant, with reflection (grpcio: v1alpha, grpclib: v1), shared by the tests of this file."""
    with participant(cast(Flavour, request.param)) as running:
        yield running


@pytest.fixture(scope="module", params=["grpcio", "grpclib"])
def json_shop(request: pytest.FixtureRequest) -> Iterator[Participant]:
    with participant(cast(Flavour, request.param), codec="json", reflection=False) as running:
        yield running


async def test_protobuf_goes_both_ways_by_the_canonical_mapping(shop: Participant) -> None:
    answer = {
        "receipt_id": "r-1",
        "amount": 12,
        "at": "2026-01-02T03:04:05Z",
        "extra": {"deep": [1, {"er": None}]},
        "note": "",
        "kind": "KIND_GIFT",
    }
    shop.script({"Reserve": [{"answer": answer}]})
    request = {
        "order_id": "o-1",
        "amount": "9007199254740993",
        "lines": [{"sku": "a", "quantity": 2}],
        "labels": {"k": "v"},
        "at": "2026-01-02T03:04:05.5Z",
        "extra": {"x": [True]},
        "kind": "KIND_GIFT",
        "token": base64.b64encode(b"\xff\x00").decode(),
    }
    async with calling(shop) as caller:
        got = await caller.call(step(request=request))
    assert got == Answer(
        outcome=Outcome.DONE,
        response={
            "receipt_id": "r-1",
            "ok": False,
            "amount": "12",
            "at": "2026-01-02T03:04:05Z",
            "extra": {"deep": [1.0, {"er": None}]},
            "note": "",
            "text_value": "",
            "kind": "KIND_GIFT",
            "lines": [],
        },
    )
    assert shop.calls()[-1].request == {
        "orderId": "o-1",
        "amount": "9007199254740993",
        "lines": [{"sku": "a", "quantity": 2}],
        "labels": {"k": "v"},
        "at": "2026-01-02T03:04:05.500Z",
        "extra": {"x": [True]},
        "kind": "KIND_GIFT",
        "token": "/wA=",
    }


async def test_json_goes_both_ways_as_it_is(json_shop: Participant) -> None:
    json_shop.script({"Reserve": [{"answer": {"any": ["thing", 1, None, "ü"]}}]})
    async with calling(json_shop) as caller:
        got = await caller.call(step(request={"what": {"ever": 1}, "ü": "ß"}))
    assert got == Answer(outcome=Outcome.DONE, response={"any": ["thing", 1, None, "ü"]})
    assert json_shop.calls()[-1].request == {"what": {"ever": 1}, "ü": "ß"}


async def test_the_participant_sees_metadata_and_deadline(shop: Participant) -> None:
    shop.script({})
    call = step(
        workflow_name="Bestellung für 100%",
        step_name="予約\r\nx-evil: 1",
        action=StepAction.COMPENSATE,
        attempt=3,
        epoch=7,
        idempotency_key="saga-1:0:compensate",
        correlation_id=" c-1",
        timeout_secs=20.0,
    )
    async with calling(shop) as caller:
        assert (await caller.call(call)).outcome is Outcome.DONE
    seen = shop.calls()[-1]
    ours = {key: value for key, value in seen.metadata.items() if key != "user-agent"}
    assert ours == {
        "saga-id": "saga-1",
        "saga-workflow": "Bestellung f%C3%BCr 100%25",
        "saga-step": "%E4%BA%88%E7%B4%84%0D%0Ax-evil: 1",
        "saga-action": "compensate",
        "saga-attempt": "3",
        "saga-epoch": "7",
        "idempotency-key": "saga-1:0:compensate",
        "x-correlation-id": "%20c-1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    assert seen.timeout_secs is not None
    assert 10 < seen.timeout_secs <= 20.1


async def test_a_correlation_id_that_is_not_set_is_not_sent(shop: Participant) -> None:
    shop.script({})
    async with calling(shop) as caller:
        await caller.call(step())
    assert "x-correlation-id" not in shop.calls()[-1].metadata


async def test_a_short_name_is_the_only_service_of_that_name(shop: Participant) -> None:
    shop.script({})
    async with calling(shop) as caller:
        assert (await caller.call(step("Payments.Refund"))).outcome is Outcome.DONE
    assert (shop.calls()[-1].service, shop.calls()[-1].method) == ("shop.v1.Payments", "Refund")


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("Inventory.Steal", "no method Steal in shop.v1.Inventory"),
        ("Warehouse.Reserve", "no service Warehouse"),
        ("shop.v9.Inventory.Reserve", "no service shop.v9.Inventory"),
        ("Inventory.Watch", "streaming"),
        ("Inventory.Count", "not an object"),
    ],
)
async def test_what_cannot_be_called_is_told_with_what_there_is(shop: Participant, method: str, told: str) -> None:
    before = len(shop.calls())
    async with calling(shop) as caller:
        answer = await caller.call(step(method))
    assert (answer.outcome, answer.code, answer.permanent) == (Outcome.NOT_DONE, "UNIMPLEMENTED", True)
    assert told in answer.message
    if "not an object" not in told:
        assert "shop.v1.Payments (Charge, Refund)" in answer.message
    assert len(shop.calls()) == before


async def test_an_ambiguous_short_name_is_told_and_the_full_name_works() -> None:
    with participant("grpclib", ambiguous=True) as shop:
        async with calling(shop) as caller:
            answer = await caller.call(step("Inventory.Reserve"))
            assert (answer.outcome, answer.code, answer.permanent) == (Outcome.NOT_DONE, "UNIMPLEMENTED", True)
            assert "ambiguous: shop.v1.Inventory, shop.v2.Inventory" in answer.message
            assert (await caller.call(step("shop.v2.Inventory.Reserve"))).outcome is Outcome.DONE
        assert shop.calls()[-1].service == "shop.v2.Inventory"


async def test_unknown_keys_are_dropped_at_any_depth_unless_strict(shop: Participant) -> None:
    shop.script({})
    request = {"order_id": "o-1", "colour": "red", "lines": [{"sku": "a", "colour": "red"}]}
    async with calling(shop) as caller:
        assert (await caller.call(step(request=request))).outcome is Outcome.DONE
        assert shop.calls()[-1].request == {"orderId": "o-1", "lines": [{"sku": "a"}]}
        before = len(shop.calls())
        strict = await caller.call(step(request=request, strict=True))
    assert (strict.outcome, strict.code, strict.permanent) == (Outcome.NOT_DONE, "INVALID_ARGUMENT", True)
    assert "colour" in strict.message
    assert len(shop.calls()) == before


async def test_a_value_of_the_wrong_type_names_its_field(shop: Participant) -> None:
    async with calling(shop) as caller:
        answer = await caller.call(step(request={"order_id": 5}))
    assert (answer.outcome, answer.code, answer.permanent) == (Outcome.NOT_DONE, "INVALID_ARGUMENT", True)
    assert "order_id" in answer.message


async def test_a_status_is_told_with_its_text_and_the_pause_asked_for(shop: Participant) -> None:
    told = "ausverkauft \x00\x1b[31m\n" + "x" * 3000
    shop.script({"Reserve": [{"status": "ABORTED", "message": told, "retry_after_secs": 2.25}]})
    async with calling(shop) as caller:
        answer = await caller.call(step())
    assert (answer.outcome, answer.code, answer.permanent) == (Outcome.REFUSED, "ABORTED", False)
    assert answer.retry_after_secs == 2.25
    assert answer.message.startswith("ausverkauft ��[31m xxx")
    assert len(answer.message) <= 2000


@pytest.mark.parametrize(("asked", "kept"), [(0.0, 0.0), (10**9, 86_400.0), (-5.0, None)])
async def test_the_pause_asked_for_is_bounded(shop: Participant, asked: float, kept: float | None) -> None:
    shop.script({"Reserve": [{"status": "UNAVAILABLE", "retry_after_secs": asked}]})
    async with calling(shop) as caller:
        assert (await caller.call(step())).retry_after_secs == kept


async def test_methods_come_from_a_descriptor_set_file(tmp_path: Path) -> None:
    path = tmp_path / "shop.bin"
    path.write_bytes(compiled("shop.proto"))
    with participant("grpclib", reflection=False) as shop:
        settings = ServiceSettings(**shop.settings(), descriptor_set=str(path))
        async with calling({"shop": settings}) as caller:
            assert (await caller.call(step("Payments.Charge"))).outcome is Outcome.DONE
            assert "no method Steal" in (await caller.call(step("Payments.Steal"))).message


@pytest.mark.parametrize("content", [None, b"\xff\xff not a descriptor set", b"\n\x10\n\x01a\x1a\x0bmissing.one"])
async def test_a_descriptor_set_that_cannot_be_used_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "shop.bin"
    if content is not None:
        path.write_bytes(content)
    settings = ServiceSettings(host="127.0.0.1", port=1, descriptor_set=str(path))
    async with calling({"shop": settings}) as caller:
        answer = await caller.call(step())
    assert (answer.outcome, answer.permanent) == (Outcome.NOT_DONE, False)
    assert "shop.bin" in answer.message


@pytest.mark.parametrize("flavour", ["grpcio", "grpclib"])
async def test_a_participant_without_reflection_is_told_what_to_configure(flavour: Flavour) -> None:
    with participant(flavour, reflection=False) as shop:
        async with calling(shop) as caller:
            answer = await caller.call(step())
    assert (answer.outcome, answer.code, answer.permanent) == (Outcome.NOT_DONE, "UNIMPLEMENTED", True)
    assert "descriptor_set" in answer.message


async def test_a_service_that_is_not_configured_is_told_with_those_that_are() -> None:
    settings = ServiceSettings(host="127.0.0.1", port=1)
    async with calling({"shop": settings, "bank": settings}) as caller:
        answer = await caller.call(step(service="warehouse"))
    assert (answer.outcome, answer.permanent) == (Outcome.NOT_DONE, True)
    assert "bank, shop" in answer.message


@pytest.mark.parametrize("codec", ["protobuf", "json"])
async def test_what_is_over_the_limit_is_refused_both_ways(codec: Codec) -> None:
    with participant("grpcio", codec=codec) as shop:
        async with calling(shop, max_payload_bytes=50_000) as caller:
            too_large = await caller.call(step(request={"order_id": "x" * 50_001}))
            assert (too_large.outcome, too_large.permanent) == (Outcome.NOT_DONE, True)
            assert "50000" in too_large.message
            assert shop.calls() == []

            shop.script({"Reserve": [{"answer": {"text_value": "y" * 3_000_000}, "times": 1}, {"answer": {}}]})
            answer = await caller.call(step())
            assert (answer.outcome, answer.code, answer.permanent) == (Outcome.UNKNOWN, "RESOURCE_EXHAUSTED", True)
            assert "50000" in answer.message
            assert "3000" in answer.message
            assert (await caller.call(step())).outcome is Outcome.DONE


async def test_a_request_larger_than_the_window_arrives_whole(shop: Participant) -> None:
    shop.script({"Reserve": [{"answer": {"text_value": "z" * 900_000}}]})
    async with calling(shop) as caller:
        answer = await caller.call(step(request={"order_id": "x" * 900_000}))
    assert answer.outcome is Outcome.DONE
    assert answer.response is not None
    assert len(answer.response["text_value"]) == 900_000
    assert len(shop.calls()[-1].request["orderId"]) == 900_000


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff",  # no protobuf at all
        b"\x0a\x02\xc3\x28",  # a string that is not UTF-8
        b"\x2a\x0f\x0a\x0d\x0a\x01n\x12\x08\x11" + b"\x00" * 6 + b"\xf8\x7f",  # NaN in a Struct
        b"\x2a" + b"\x05" * 40,
    ],
)
async def test_an_answer_that_is_no_message_is_in_doubt_for_good(shop: Participant, raw: bytes) -> None:
    shop.script({"Reserve": [{"raw": base64.b64encode(raw).decode()}]})
    async with calling(shop) as caller:
        answer = await caller.call(step())
    assert (answer.outcome, answer.code, answer.permanent) == (Outcome.UNKNOWN, "INTERNAL", True)


async def test_nul_in_an_answer_is_replaced(shop: Participant) -> None:
    shop.script({"Reserve": [{"answer": {"receipt_id": "a\x00b"}}]})
    async with calling(shop) as caller:
        answer = await caller.call(step())
    assert answer.response is not None
    assert answer.response["receipt_id"] == "a�b"


async def test_many_calls_at_once_share_the_connection(shop: Participant) -> None:
    shop.script({})
    before = len(shop.calls())
    answers: list[Answer] = []

    async def one(number: int) -> None:
        answers.append(await caller.call(step(request={"order_id": str(number)})))

    async with calling(shop) as caller:
        async with trio.open_nursery() as nursery:
            for number in range(80):
                nursery.start_soon(one, number)
        assert caller.connections("shop") == 1
    assert {answer.outcome for answer in answers} == {Outcome.DONE}
    assert {call.request["orderId"] for call in shop.calls()[before:]} == {str(number) for number in range(80)}


async def test_settings_can_be_read_from_configuration() -> None:
    settings = msgspec.convert({"host": "inventory", "port": 50051, "tls": {"ca_file": "ca.pem"}}, ServiceSettings)
    assert settings.codec == "protobuf"
    assert settings.tls is not None
