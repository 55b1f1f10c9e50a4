"""When a participant is asked for its methods again, and on which connection it is called: noted by a real grpclib
server in this process, stream by stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from grpclib.const import Status
from grpclib.events import RecvRequest, listen
from grpclib.exceptions import GRPCError
from grpclib.reflection.service import ServerReflection
from grpclib.server import Server, Stream

from bridge import open_loop, run_aio
from demo.proto.orders_grpc import InventoryServiceBase
from demo.proto.orders_pb2 import OrderRef, Reservation, ReserveRequest, Undone
from rpc.caller import GrpcStepCaller
from rpc.channels import PoolLimits
from rpc.settings import ServiceSettings
from saga.ports import Answer, Outcome
from tests.rpc.calling import step
from tests.support.line import line_to
from tests.support.server_process import free_port


class Shop(InventoryServiceBase):
    """`lookups` counts the conversations about its methods, `peers` holds the client's address of each call."""

    def __init__(self) -> None:
        self.lookups = 0
        self.peers: list[object] = []
        self.refusals = 0

    async def Reserve(self, stream: Stream[ReserveRequest, Reservation]) -> None:
        await stream.recv_message()
        if self.refusals:
            self.refusals -= 1
            raise GRPCError(Status.UNIMPLEMENTED, "not any more")
        await stream.send_message(Reservation(reservation_id="r-1"))

    async def Release(self, stream: Stream[OrderRef, Undone]) -> None:
        raise GRPCError(Status.UNIMPLEMENTED)

    async def note(self, event: RecvRequest) -> None:
        if "ServerReflection" in event.method_name:
            self.lookups += 1
        else:
            self.peers.append(event.peer.addr())

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = Server(ServerReflection.extend([self]))
        listen(server, RecvRequest, self.note)
        port = free_port()
        await run_aio(server.start("127.0.0.1", port))
        try:
            yield port
        finally:
            server.close()
            await run_aio(server.wait_closed())


async def reserve(caller: GrpcStepCaller) -> Answer:
    return await caller.call(step("InventoryService.Reserve", request={"order_id": "o-1", "sku": "lamp"}))


@asynccontextmanager
async def caller_of(port: int, limits: PoolLimits | None = None) -> AsyncIterator[GrpcStepCaller]:
    caller = GrpcStepCaller({"shop": ServiceSettings(host="127.0.0.1", port=port)}, limits=limits)
    try:
        yield caller
    finally:
        await caller.aclose()


async def test_methods_are_looked_up_once_for_many_calls_on_one_connection() -> None:
    shop = Shop()
    async with open_loop(), shop.listening() as port, caller_of(port) as caller:
        for _ in range(3):
            assert (await reserve(caller)).outcome is Outcome.DONE
        assert shop.lookups == 1
        assert len(set(shop.peers)) == 1


async def test_a_method_said_to_be_unimplemented_is_looked_up_before_its_next_call() -> None:
    shop = Shop()
    async with open_loop(), shop.listening() as port, caller_of(port) as caller:
        shop.refusals = 1
        assert (await reserve(caller)).code == "UNIMPLEMENTED"
        assert shop.lookups == 1
        assert (await reserve(caller)).outcome is Outcome.DONE
        assert shop.lookups == 2


async def test_a_participant_whose_connections_were_lost_is_asked_for_its_methods_again() -> None:
    shop = Shop()
    async with open_loop(), shop.listening() as port:
        with line_to(port) as line:
            async with caller_of(line.port) as caller:
                assert (await reserve(caller)).outcome is Outcome.DONE
                line.cut()
                with trio.fail_after(5):
                    while caller.connections("shop"):
                        await trio.lowlevel.checkpoint()
                line.mend()
                # It may have come back as another version, whose messages differ.
                assert (await reserve(caller)).outcome is Outcome.DONE
                assert shop.lookups == 2


async def test_a_connection_takes_no_more_calls_than_its_stream_ids_are_meant_for() -> None:
    shop = Shop()
    async with open_loop(), shop.listening() as port, caller_of(port, PoolLimits(calls_per_connection=2)) as caller:
        for _ in range(6):
            assert (await reserve(caller)).outcome is Outcome.DONE
        assert [shop.peers.count(peer) for peer in dict.fromkeys(shop.peers)] == [2, 2, 2]
