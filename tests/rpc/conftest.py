"""A real gRPC door in front of a real orchestrator, and a client for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpclib.client import Channel
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import GRPCError
from k1s0.system.saga.v1 import saga_pb2 as pb
from k1s0.system.saga.v1.saga_grpc import SagaServiceStub

from bridge import open_loop, run_aio
from rpc.server import GrpcFront, serve_grpc
from saga.authentication import Authenticator, OpenAccess
from tests.support.orchestrator import House, orchestrator
from web.metrics import PrometheusMeter

T = TypeVar("T")
NO_SAGA = "00000000-0000-4000-8000-000000000000"


class Door:
    """An orchestrator, its gRPC door, and a client."""

    def __init__(self, house: House, front: GrpcFront, channel: Channel, meter: PrometheusMeter) -> None:
        self.house = house
        self.front = front
        self.channel = channel
        self.meter = meter
        self.stub = SagaServiceStub(channel)

    async def ask(self, method: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        async def asked() -> T:
            return await method(*args, timeout=10, **kwargs)

        return await run_aio(asked())

    async def refused(self, method: Callable[..., Awaitable[Any]], request: Message, **kwargs: Any) -> GRPCError:
        with pytest.raises(GRPCError) as caught:
            await self.ask(method, request, **kwargs)
        return caught.value

    async def start(self, **fields: Any) -> str:
        answer = await self.ask(self.stub.StartSaga, pb.StartSagaRequest(workflow_name="order", **fields))
        return answer.saga_id

    async def ended(self, saga_id: str) -> pb.GetSagaResponse:
        return await self.ask(self.stub.GetSaga, pb.GetSagaRequest(saga_id=saga_id, wait_secs=9))


@asynccontextmanager
async def open_door(
    max_payload_bytes: int = 1 << 20, authenticator: Authenticator | None = None
) -> AsyncIterator[Door]:
    meter = PrometheusMeter()
    async with (
        open_loop(),
        orchestrator(meter, max_payload_bytes) as house,
        serve_grpc(
            house.service, "127.0.0.1", 0, authenticator=authenticator or OpenAccess(), drain=house.drain, meter=meter
        ) as front,
    ):
        channel = Channel("127.0.0.1", front.port, status_details_codec=ProtoStatusDetailsCodec())
        try:
            yield Door(house, front, channel, meter)
        finally:
            channel.close()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


def reason(error: GRPCError) -> str:
    (info,) = [detail for detail in error.details if isinstance(detail, ErrorInfo)]
    assert info.domain == "saga"
    return str(info.reason)


def fields(error: GRPCError) -> list[str]:
    return [v.field for detail in error.details if isinstance(detail, BadRequest) for v in detail.field_violations]
