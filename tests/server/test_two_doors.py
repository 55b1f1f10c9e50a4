"""REST and gRPC of one running server: what one door is told, the other one knows."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from k1s0.system.saga.v1 import saga_pb2 as pb
from k1s0.system.saga.v1.saga_grpc import SagaServiceStub

from tests.support.participants import Script, participant
from tests.support.postgres import in_plain_loop
from tests.support.server_process import ServerProcess, server_process

T = TypeVar("T")

ORDER = """\
name: order
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
  - {name: charge, service: shop, method: Payments.Charge, retry: {max_attempts: 1}}
"""


def by_grpc(server: ServerProcess, ask: Callable[[SagaServiceStub], Awaitable[T]]) -> T:
    async def body() -> T:
        async with Channel("127.0.0.1", server.grpc_port) as channel:
            return await ask(SagaServiceStub(channel))

    return in_plain_loop(body)


def millis(timestamp: Any) -> int:
    return int(timestamp.seconds * 1000 + timestamp.nanos // 1_000_000)


def rest_millis(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def test_a_saga_started_by_either_door_is_the_same_saga_at_the_other(tmp_path: Path) -> None:
    refuses: Script = {"Charge": [{"status": "FAILED_PRECONDITION", "message": "card declined"}], "*": [{"once": True}]}
    with (
        participant(flavour="grpclib", script=refuses) as shop,
        server_process(tmp_path, {"services": {"shop": shop.settings()}}) as server,
    ):
        server.start()
        registered = by_grpc(
            server, lambda stub: stub.RegisterWorkflow(pb.RegisterWorkflowRequest(workflow_yaml=ORDER))
        )
        assert (registered.name, registered.version, registered.step_count) == ("order", 1, 2)
        (summary,) = server.call("GET", "/api/v1/workflows")[1]["workflows"]
        assert summary == {"name": "order", "version": 1, "step_count": 2, "step_names": ["reserve", "charge"]}

        payload = {"order_id": "o-1", "amount": 7}
        request = pb.StartSagaRequest(
            workflow_name="order", payload=json.dumps(payload).encode(), correlation_id="c-1", initiated_by="till"
        )
        started = by_grpc(server, lambda stub: stub.StartSaga(request, metadata={"idempotency-key": "k-1"}))
        # The same key and the same request at the other door: the same saga.
        body = {"workflow_name": "order", "payload": payload, "correlation_id": "c-1", "initiated_by": "till"}
        status, answer = server.call("POST", "/api/v1/sagas", body, Idempotency_Key="k-1")
        assert (status, answer) == (201, {"saga_id": started.saga_id, "status": "STARTED"})

        rest = server.ended(started.saga_id)
        grpc = by_grpc(server, lambda stub: stub.GetSaga(pb.GetSagaRequest(saga_id=started.saga_id)))
        saga = rest["saga"]
        assert saga["status"] == "FAILED"
        assert saga["next_attempt_at"] is None
        assert not grpc.saga.HasField("next_attempt_at")
        assert saga["saga_id"] == grpc.saga.id
        for name in (
            *("workflow_name", "workflow_version", "current_step", "status", "correlation_id", "initiated_by"),
            *("error_message", "compensation_failed", "attempt"),
        ):
            assert saga[name] == getattr(grpc.saga, name), name
        assert saga["payload"] == json.loads(grpc.saga.payload) == payload
        for name in ("created_at", "updated_at"):
            assert rest_millis(saga[name]) == millis(getattr(grpc.saga, name)), name
        assert len(rest["step_logs"]) == len(grpc.step_logs) == 3
        for log, proto in zip(rest["step_logs"], grpc.step_logs, strict=True):
            for name in ("id", "saga_id", "step_index", "step_name", "action", "status", "attempts"):
                assert log[name] == getattr(proto, name), name
            assert (log["error_message"] or "") == proto.error_message
            for name in ("request_payload", "response_payload"):
                assert log[name] == (json.loads(getattr(proto, name)) if getattr(proto, name) else None), name
            for name in ("started_at", "completed_at"):
                assert rest_millis(log[name]) == millis(getattr(proto, name)), name

        listed = by_grpc(server, lambda stub: stub.ListSagas(pb.ListSagasRequest(correlation_id="c-1")))
        page = server.call("GET", "/api/v1/sagas?correlation_id=c-1")[1]
        assert [one.id for one in listed.sagas] == [one["saga_id"] for one in page["sagas"]] == [started.saga_id]
        assert listed.pagination.total_count == page["pagination"]["total_count"] == 1

        with pytest.raises(GRPCError) as refused:
            by_grpc(server, lambda stub: stub.CancelSaga(pb.CancelSagaRequest(saga_id=started.saga_id)))
        assert refused.value.status is Status.FAILED_PRECONDITION
        assert server.call("POST", f"/api/v1/sagas/{started.saga_id}/cancel")[0] == 409


def test_a_cancel_by_one_door_is_watched_at_the_other(tmp_path: Path) -> None:
    with (
        participant(flavour="grpclib", script={"Charge": [{"hang": True}], "*": [{"once": True}]}) as shop,
        server_process(tmp_path, {"services": {"shop": shop.settings()}}) as server,
    ):
        server.start()
        server.register(ORDER)
        saga_id = server.start_saga("order", {})
        while not shop.calls("Charge"):
            pass

        async def watch(stub: SagaServiceStub) -> list[str]:
            seen: list[str] = []
            async with stub.WatchSaga.open() as stream:
                await stream.send_message(pb.WatchSagaRequest(saga_id=saga_id), end=True)
                async for message in stream:
                    if not seen:
                        assert server.call("POST", f"/api/v1/sagas/{saga_id}/cancel")[0] == 200
                    if not seen or seen[-1] != message.saga.status:
                        seen.append(message.saga.status)
            return seen

        assert by_grpc(server, watch) == ["RUNNING", "COMPENSATING", "CANCELLED"]
