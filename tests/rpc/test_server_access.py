"""The gRPC door and its guard: who is let in to which method, and what the others are told (spec sections 5, 9)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from google.protobuf.message import Message
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest
from grpclib.reflection.service import ServerReflection
from grpclib.reflection.v1.reflection_grpc import ServerReflectionStub
from grpclib.reflection.v1.reflection_pb2 import ServerReflectionRequest
from k1s0.system.saga.v1 import saga_pb2 as pb
from multidict import MultiDict

from bridge import run_aio
from rpc.server import PERMISSIONS
from saga.ports import SagaFilter
from server import jwks
from server.tokens import LEEWAY_SECS
from tests.rpc.conftest import NO_SAGA, Door, open_door, reason
from tests.support.bad_tokens import DENIED, EXPIRED, bad_tokens
from tests.support.issuer import Issuer, issuer, token, token_of
from tests.support.orchestrator import HANGS, ORDER
from tests.support.verifier import verifier

ASKS = {
    "StartSaga": "write sagas",
    "GetSaga": "read sagas",
    "ListSagas": "read sagas",
    "CancelSaga": "write sagas",
    "RetryCompensation": "write sagas",
    "WatchSaga": "read sagas",
    "RegisterWorkflow": "write workflows",
    "ListWorkflows": "read workflows",
    "GetWorkflow": "read workflows",
    "ListAudit": "read audit",
}
"""Spec section 9, by method; one that is not here fails a test."""

READS = {"read sagas", "read workflows", "read audit"}
MAY = {
    "sys_auditor": READS,
    "sys_operator": READS | {"write sagas", "write workflows"},
    "sys_admin": READS | {"write sagas", "write workflows"},
}

REQUESTS: dict[str, Message] = {
    "StartSaga": pb.StartSagaRequest(workflow_name="order"),
    "GetSaga": pb.GetSagaRequest(saga_id=NO_SAGA),
    "ListSagas": pb.ListSagasRequest(),
    "CancelSaga": pb.CancelSagaRequest(saga_id=NO_SAGA),
    "RetryCompensation": pb.RetryCompensationRequest(saga_id=NO_SAGA),
    "WatchSaga": pb.WatchSagaRequest(saga_id=NO_SAGA),
    "RegisterWorkflow": pb.RegisterWorkflowRequest(workflow_yaml=ORDER),
    "ListWorkflows": pb.ListWorkflowsRequest(),
    "GetWorkflow": pb.GetWorkflowRequest(name="order"),
    "ListAudit": pb.ListAuditRequest(),
}


@asynccontextmanager
async def guarded_door(idp: Issuer) -> AsyncIterator[Door]:
    async with verifier(idp) as access, open_door(authenticator=access) as door:
        yield door


async def told(door: Door, method: str, authorization: str | list[str] | None) -> GRPCError | None:
    """What a method answers to a request that could be answered; None: it is answered."""
    values = [authorization] if isinstance(authorization, str) else authorization or []
    metadata = MultiDict(("authorization", value) for value in values)
    try:
        await door.ask(getattr(door.stub, method), REQUESTS[method], metadata=metadata)
    except GRPCError as error:
        return error
    return None


def test_every_method_asks_what_the_specification_says() -> None:
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in service.methods} == set(ASKS)
    assert {name: permission.value for name, permission in PERMISSIONS.items()} == ASKS


async def test_a_method_nobody_declared_anything_about_works_for_nobody(
    idp: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(PERMISSIONS, "ListSagas")
    async with guarded_door(idp) as door:
        error = await told(door, "ListSagas", f"Bearer {token()}")
    assert error is not None
    assert error.status is Status.INTERNAL


class Stray:
    """A service of some other author."""

    def __mapping__(self) -> dict[str, Any]:
        return {"/shop.v1.Stray/Tell": None}


async def test_a_service_nobody_declared_anything_about_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = ServerReflection.extend
    monkeypatch.setattr(ServerReflection, "extend", lambda services: [*extend(services), Stray()])
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_door():
            pass
    assert caught.group_contains(ValueError, match=r"nobody declared who may call /shop\.v1\.Stray/Tell")


async def test_every_bad_token_is_refused_by_every_method_with_its_code(idp: Issuer) -> None:
    wrong: dict[str, Any] = {}
    async with guarded_door(idp) as door:
        table = bad_tokens()
        del table["an empty header"]  # no gRPC client sends one
        for name, (authorization, expected) in table.items():
            for method in ASKS:
                error = await told(door, method, authorization)
                status = Status.PERMISSION_DENIED if expected == DENIED else Status.UNAUTHENTICATED
                if error is None or error.status is not status or reason(error) != expected:
                    wrong[f"{method}: {name}"] = error
        assert wrong == {}
        assert len(table) >= 40
        # None of them has done anything.
        found = await door.house.service.list_sagas(SagaFilter())
        assert found.total_count == 0
        (workflow,) = await door.house.service.workflows()
        assert workflow.version == 1


@pytest.mark.parametrize("role", sorted(MAY))
async def test_each_role_may_do_exactly_what_the_matrix_says(idp: Issuer, role: str) -> None:
    async with guarded_door(idp) as door:
        errors = {method: await told(door, method, f"Bearer {token_of(role)}") for method in ASKS}
    denied = {
        method
        for method, error in errors.items()
        if error is not None and error.status in (Status.PERMISSION_DENIED, Status.UNAUTHENTICATED)
    }
    assert set(ASKS) - denied == {method for method, asks in ASKS.items() if asks in MAY[role]}
    assert errors["ListSagas"] is errors["GetWorkflow"] is None
    assert (errors["StartSaga"] is None) == ("write sagas" in MAY[role])


async def test_the_line_of_a_call_says_who_called_and_from_where(idp: Issuer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with guarded_door(idp) as door:
        for bearer in (token_of("sys_auditor", sub="alice"), token_of("nothing", sub="mallory"), "garbage"):
            await told(door, "ListSagas", f"Bearer {bearer}")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("grpc_call ")]
    assert [(line.count(" peer=127.0.0.1 "), line.partition(" principal=")[2].split(" ")[0]) for line in lines] == [
        (1, "alice"),
        (1, "mallory"),
        (1, "None"),
    ]


async def test_health_and_reflection_are_open(idp: Issuer) -> None:
    async with guarded_door(idp) as door:
        for metadata in ({}, {"authorization": "Bearer garbage"}):
            answer = await door.ask(HealthStub(door.channel).Check, HealthCheckRequest(), metadata=metadata)
            assert answer.status == 1
            listed = await door.ask(
                ServerReflectionStub(door.channel).ServerReflectionInfo,
                [ServerReflectionRequest(list_services="")],
                metadata=metadata,
            )
            assert listed


async def test_with_the_issuer_away_an_unknown_key_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 0.0)
    with issuer() as idp:
        async with guarded_door(idp) as door:
            idp.status = 500
            error = await told(door, "ListSagas", f"Bearer {token('rsa2')}")
            assert error is not None
            assert (error.status, reason(error)) == (Status.UNAVAILABLE, "SYS_SAGA_UNAVAILABLE")
            assert await told(door, "ListSagas", f"Bearer {token()}") is None


async def test_a_watch_ends_with_its_token_and_a_long_poll_answers_then(idp: Issuer) -> None:
    at = time.time()
    # By a clock that stands still it is good to be let in, however long this machine takes, and then for half a second.
    good = {"authorization": f"Bearer {token(exp=at - LEEWAY_SECS + 0.5)}"}
    async with verifier(idp, lambda: at) as access, open_door(authenticator=access) as door:
        door.house.answers["Inventory.Reserve"] = [HANGS]
        started = await door.ask(door.stub.StartSaga, REQUESTS["StartSaga"], metadata=good)

        async def watch(channel: Channel) -> None:
            async with door.stub.WatchSaga.open(metadata=good) as stream:
                await stream.send_message(pb.WatchSagaRequest(saga_id=started.saga_id), end=True)
                async for message in stream:
                    assert message.saga.status in {"STARTED", "RUNNING"}

        with trio.fail_after(30):
            with pytest.raises(GRPCError) as ended:
                await run_aio(watch(door.channel))
            answer = await run_aio(
                door.stub.GetSaga(pb.GetSagaRequest(saga_id=started.saga_id, wait_secs=60), metadata=good)
            )
    assert (ended.value.status, reason(ended.value)) == (Status.UNAUTHENTICATED, EXPIRED)
    assert answer.saga.status in {"STARTED", "RUNNING"}
