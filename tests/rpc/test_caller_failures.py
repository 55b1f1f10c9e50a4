"""Participants that are down, die, freeze, restart or refuse: what the caller tells, and that it recovers by itself."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from rpc.channels import PoolLimits
from rpc.settings import ServiceSettings
from saga.ports import Answer, Outcome
from tests.rpc.calling import calling, step
from tests.support.participants import Flavour, participant

FLAVOURS: list[Flavour] = ["grpcio", "grpclib"]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("codec", ["protobuf", "json"])
async def test_a_participant_that_is_down_has_not_done_it(codec: str) -> None:
    settings = ServiceSettings(host="127.0.0.1", port=closed_port(), codec=codec)  # type: ignore[arg-type]  # params
    async with calling({"shop": settings}) as caller:
        for _ in range(3):
            answer = await caller.call(step())
            assert (answer.outcome, answer.code, answer.permanent) == (Outcome.NOT_DONE, "UNAVAILABLE", False)
            assert f"127.0.0.1:{settings.port}" in answer.message


@pytest.mark.parametrize("codec", ["protobuf", "json"])
async def test_a_name_that_does_not_resolve_has_not_done_it(codec: str) -> None:
    settings = ServiceSettings(host="no-such-host.invalid", port=1, codec=codec)  # type: ignore[arg-type]  # params
    async with calling({"shop": settings}) as caller:
        answer = await caller.call(step())
    assert (answer.outcome, answer.code) == (Outcome.NOT_DONE, "UNAVAILABLE")


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_participant_killed_in_flight_leaves_it_unknown_and_is_called_again_after_its_restart(
    flavour: Flavour,
) -> None:
    with participant(flavour, script={"Reserve": [{"die": "after", "times": 1}, {"answer": {}}]}) as shop:
        async with calling(shop) as caller:
            answer = await caller.call(step(attempt=1))
            assert (answer.outcome, answer.code, answer.permanent) == (Outcome.UNKNOWN, "UNAVAILABLE", False)
            down = await caller.call(step(attempt=2))
            assert (down.outcome, down.code) == (Outcome.NOT_DONE, "UNAVAILABLE")
            shop.restart()
            assert (await caller.call(step(attempt=3))).outcome is Outcome.DONE
        assert shop.effects() == {"saga-1:0:execute": 2}
        assert [call.metadata["saga-attempt"] for call in shop.calls()] == ["1", "3"]


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_frozen_participant_is_noticed_at_the_deadline_and_left(flavour: Flavour) -> None:
    limits = PoolLimits(ping_timeout_secs=0.2)
    with participant(flavour) as shop:
        async with calling(shop, limits=limits) as caller:
            assert (await caller.call(step())).outcome is Outcome.DONE
            shop.freeze()
            started = trio.current_time()
            answer = await caller.call(step(timeout_secs=0.3))
            assert (answer.outcome, answer.code) == (Outcome.UNKNOWN, "DEADLINE_EXCEEDED")
            assert 0.3 <= trio.current_time() - started < 1.0
            # The connection that stays silent is given up; a call meanwhile goes to a new one and is served at once
            # when the participant wakes.
            with trio.fail_after(5):
                while caller.connections("shop"):
                    await trio.testing.wait_all_tasks_blocked(0.05)
            shop.thaw()
            assert (await caller.call(step())).outcome is Outcome.DONE


async def test_a_slow_answer_on_a_healthy_connection_does_not_cost_the_connection() -> None:
    with participant("grpcio", script={"Charge": [{"hang": True}]}) as shop:
        async with calling(shop, limits=PoolLimits(ping_timeout_secs=0.2)) as caller:
            for _ in range(4):
                answer = await caller.call(step("Payments.Charge", timeout_secs=0.1))
                assert (answer.outcome, answer.code) == (Outcome.UNKNOWN, "DEADLINE_EXCEEDED")
            assert (await caller.call(step())).outcome is Outcome.DONE
            assert caller.connections("shop") >= 1


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_cancel_reaches_the_participant_at_once(flavour: Flavour) -> None:
    with participant(flavour, script={"Reserve": [{"hang": True}]}) as shop:
        async with calling(shop) as caller, trio.open_nursery() as nursery:
            nursery.start_soon(caller.call, step(timeout_secs=1000.0))
            await shop.until(1)
            nursery.cancel_scope.cancel()
        assert nursery.cancel_scope.cancelled_caught
        await shop.until(1, ended="cancelled")


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_the_participant_is_told_to_stop_when_the_deadline_passes(flavour: Flavour) -> None:
    with participant(flavour, script={"Reserve": [{"hang": True}]}) as shop:
        async with calling(shop) as caller:
            answer = await caller.call(step(timeout_secs=0.2))
            assert (answer.outcome, answer.code) == (Outcome.UNKNOWN, "DEADLINE_EXCEEDED")
            await shop.until(1, ended="cancelled")


async def test_a_deadline_that_passes_before_the_call_could_leave_has_not_done_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, says nothing
        settings = ServiceSettings(host="127.0.0.1", port=mute.getsockname()[1])
        async with calling({"shop": settings}) as caller:
            answer = await caller.call(step(timeout_secs=0.2))
    assert (answer.outcome, answer.code) == (Outcome.NOT_DONE, "DEADLINE_EXCEEDED")


async def test_a_graceful_stop_lets_the_call_in_flight_finish() -> None:
    with participant("grpcio", script={"Reserve": [{"delay_secs": 0.5, "answer": {"receipt_id": "r-1"}}]}) as shop:
        answers: list[Answer] = []

        async def one() -> None:
            answers.append(await caller.call(step()))

        async with calling(shop) as caller:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one)
                await shop.until(1)
                shop.stop_gracefully()
            assert [answer.outcome for answer in answers] == [Outcome.DONE]
            after = await caller.call(step())
            assert after.outcome is Outcome.NOT_DONE


async def test_calls_over_the_participants_limit_wait_and_more_connections_are_opened() -> None:
    with participant("grpcio", max_streams=4, script={"Reserve": [{"delay_secs": 0.05, "answer": {}}]}) as shop:
        answers: list[Answer] = []

        async def one() -> None:
            answers.append(await caller.call(step()))

        async with calling(shop, limits=PoolLimits(max_connections=3)) as caller:
            await caller.call(step())
            async with trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(one)
            assert caller.connections("shop") == 3
        assert [answer.outcome for answer in answers] == [Outcome.DONE] * 40


async def test_a_connection_is_replaced_before_its_stream_ids_end() -> None:
    with participant("grpclib") as shop:
        async with calling(shop, limits=PoolLimits(calls_per_connection=2)) as caller:
            for _ in range(5):
                assert (await caller.call(step())).outcome is Outcome.DONE
                assert caller.connections("shop") <= 1


async def test_a_participant_that_comes_back_with_new_methods_is_asked_again(tmp_path: Path) -> None:
    with participant("grpclib") as shop:
        async with calling(shop) as caller:
            missing = await caller.call(step("shop.v2.Inventory.Reserve"))
            assert (missing.outcome, missing.code) == (Outcome.NOT_DONE, "UNIMPLEMENTED")
            assert (await caller.call(step())).outcome is Outcome.DONE
            shop.offer_more()
            shop.restart()
            while (answer := await caller.call(step("shop.v2.Inventory.Reserve"))).code == "UNAVAILABLE":
                pass
            assert answer.outcome is Outcome.DONE


async def test_closing_ends_what_is_in_flight_and_refuses_what_comes_later() -> None:
    answers: list[Answer] = []
    with participant("grpclib", script={"Reserve": [{"hang": True}]}) as shop:
        async with calling(shop) as caller:

            async def one() -> None:
                answers.append(await caller.call(step()))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one)
                await shop.until(1)
                await caller.aclose()
            assert [answer.outcome for answer in answers] == [Outcome.UNKNOWN]
            assert (await caller.call(step())).outcome is Outcome.NOT_DONE
