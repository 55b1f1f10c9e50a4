"""Stopping the gRPC door: running calls finish, late ones get a status, and no client can hold the stop up."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import trio
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import StreamTerminatedError
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from k1s0.system.saga.v1 import saga_pb2 as pb

from bridge import open_loop, run_aio
from rpc.server import serve_grpc
from saga.authentication import OpenAccess
from saga.drain import Drain
from tests.rpc.conftest import NO_SAGA, Door, open_door
from tests.support.orchestrator import orchestrator


class Gate:
    """Holds `store.get` until it is opened."""

    def __init__(self, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = trio.Event()
        self.opened = trio.Event()
        get = door.house.store.get

        async def gated(saga_id: str) -> Any:
            self.reached.set()
            await self.opened.wait()
            return await get(saga_id)

        monkeypatch.setattr(door.house.store, "get", gated)


async def test_a_running_call_finishes_and_a_late_one_gets_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_door() as door:
        saga_id = await door.start()
        gate = Gate(door, monkeypatch)
        answers: list[Any] = []

        async def running() -> None:
            answers.append(await door.ask(door.stub.GetSaga, pb.GetSagaRequest(saga_id=saga_id)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(running)
            await gate.reached.wait()
            nursery.start_soon(door.front.drain, 5.0)
            await trio.testing.wait_all_tasks_blocked()
            error = await door.refused(door.stub.ListWorkflows, pb.ListWorkflowsRequest())
            assert (error.status, error.message) == (Status.UNAVAILABLE, "the server is shutting down")
            assert answers == []
            gate.opened.set()
        assert answers[0].saga.id == saga_id
        with pytest.raises(OSError, match="Connect call failed"):
            await run_aio(Channel("127.0.0.1", door.front.port).__connect__())


async def test_a_call_that_outlasts_the_grace_is_cut_off_and_the_drain_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_door() as door:
        gate = Gate(door, monkeypatch)

        async def cut_off() -> None:
            with pytest.raises(StreamTerminatedError):
                await door.ask(door.stub.GetSaga, pb.GetSagaRequest(saga_id=NO_SAGA))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut_off)
            await gate.reached.wait()
            with trio.fail_after(3):
                await door.front.drain(0.2)


async def test_a_client_that_stays_connected_does_not_hold_the_drain_up() -> None:
    async with open_door() as door:
        await door.start()
        idle = await trio.open_tcp_stream("127.0.0.1", door.front.port)
        async with idle:
            began = time.monotonic()
            await door.front.drain(5)
            assert time.monotonic() - began < 2
            with trio.fail_after(2):
                while await idle.receive_some():
                    pass


async def test_health_says_not_serving_as_the_drain_begins_and_its_watchers_do_not_hold_it_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_door() as door:
        gate = Gate(door, monkeypatch)
        statuses: list[int] = []
        watching = trio.Event()

        async def watch() -> None:
            async with HealthStub(door.channel).Watch.open() as stream:
                await stream.send_message(HealthCheckRequest(), end=True)
                async for message in stream:
                    statuses.append(message.status)
                    watching.set()
                    if message.status == HealthCheckResponse.NOT_SERVING:
                        gate.opened.set()

        async def watch_until_cut_off() -> None:
            with pytest.raises(StreamTerminatedError):
                await run_aio(watch())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_until_cut_off)
            nursery.start_soon(door.refused, door.stub.GetSaga, pb.GetSagaRequest(saga_id=NO_SAGA))
            await watching.wait()
            await gate.reached.wait()
            began = time.monotonic()
            await door.front.drain(20)
            assert time.monotonic() - began < 2
        assert statuses == [HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING]


async def test_leaving_the_block_stops_the_server_and_frees_the_port() -> None:
    async with open_loop(), orchestrator() as house:
        async with serve_grpc(house.service, "127.0.0.1", 0, authenticator=OpenAccess(), drain=Drain()) as front:
            port = front.port
        async with serve_grpc(house.service, "127.0.0.1", port, authenticator=OpenAccess(), drain=Drain()) as again:
            assert again.port == port


async def test_a_port_that_is_taken_is_an_os_error() -> None:
    async with open_door() as door:
        with pytest.raises(OSError, match=r"(?i)in use"):
            async with serve_grpc(
                door.house.service, "127.0.0.1", door.front.port, authenticator=OpenAccess(), drain=Drain()
            ):
                raise AssertionError("it listens")


async def test_two_servers_share_a_port_when_told_to() -> None:
    async with open_loop(), orchestrator() as house:
        serve = partial(
            serve_grpc, house.service, "127.0.0.1", authenticator=OpenAccess(), drain=Drain(), reuse_port=True
        )
        async with serve(0) as one, serve(one.port) as two:
            assert two.port == one.port
