"""The gRPC door as the reference implementation sees it: grpcio, in a process of its own.

(Its health and reflection packages register the same symbols as grpclib's, so the two cannot share a process.)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.rpc.conftest import open_door
from tests.support.orchestrator import HANGS

ROOT = Path(__file__).parents[2]

CLIENT = r"""
import json, sys
import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from k1s0.system.saga.v1 import saga_pb2 as pb

channel = grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}")

def method(name, request, reply, kind="unary_unary"):
    call = getattr(channel, kind)(
        f"/k1s0.system.saga.v1.SagaService/{name}",
        request_serializer=request.SerializeToString if hasattr(request, "SerializeToString") else None,
        response_deserializer=reply.FromString if reply else None)
    return lambda message, **kw: call(message, timeout=10, **kw)

start = method("StartSaga", pb.StartSagaRequest, pb.StartSagaResponse)
get = method("GetSaga", pb.GetSagaRequest, pb.GetSagaResponse)
cancel = method("CancelSaga", pb.CancelSagaRequest, pb.CancelSagaResponse)
watch = method("WatchSaga", pb.WatchSagaRequest, pb.WatchSagaResponse, "unary_stream")

def told(error):
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    details = {}
    for any_ in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest):
            if any_.Is(kind.DESCRIPTOR):
                value = kind()
                any_.Unpack(value)
                details[kind.__name__] = json_format.MessageToDict(value)
    return {"code": error.code().name, "message": error.details(), "details": details,
            "request_id": trailers.get("x-request-id")}

def failing(call, *args, **kw):
    try:
        answer = call(*args, **kw)
        list(answer) if hasattr(answer, "__next__") else None
    except grpc.RpcError as error:
        return error
    raise SystemExit("no error")

out = {}
saga, call = channel.unary_unary("/k1s0.system.saga.v1.SagaService/StartSaga",
    request_serializer=pb.StartSagaRequest.SerializeToString,
    response_deserializer=pb.StartSagaResponse.FromString).with_call(
    pb.StartSagaRequest(workflow_name="order", payload=b'{"a": 1}'),
    metadata=[("x-request-id", "r-1"), ("idempotency-key", "k")])
out["initial"] = dict(call.initial_metadata())
states = []
stream = watch(pb.WatchSagaRequest(saga_id=saga.saga_id))
for message in stream:
    states.append(message.saga.status)
    if message.saga.status == "RUNNING" and "cancelled" not in out:
        out["cancelled"] = cancel(pb.CancelSagaRequest(saga_id=saga.saga_id)).message
out["states"] = states
out["terminal"] = told(failing(cancel, pb.CancelSagaRequest(saga_id=saga.saga_id)))
out["unknown"] = told(failing(get, pb.GetSagaRequest(saga_id="x"), metadata=[("x-request-id", "r-2")]))
out["invalid"] = told(failing(start, pb.StartSagaRequest(workflow_name="", payload=b"{}")))
out["no_json"] = told(failing(start, pb.StartSagaRequest(workflow_name="order", payload=b"no json")))
raw = channel.unary_unary("/k1s0.system.saga.v1.SagaService/StartSaga")
out["garbage"] = told(failing(raw, b"\xff\xff", timeout=10))
out["too_large"] = told(failing(start, pb.StartSagaRequest(workflow_name="order", payload=b"x" * 3_000_000)))
out["compressed"] = failing(start, pb.StartSagaRequest(workflow_name="order", payload=b'{"a": "' + b"x" * 9999 + b'"}'),
                            compression=grpc.Compression.Gzip).code().name
out["no_method"] = failing(channel.unary_unary("/k1s0.system.saga.v1.SagaService/Nope"), b"", timeout=10).code().name
health = health_pb2_grpc.HealthStub(channel)
out["health"] = [health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
                 for name in ("", "k1s0.system.saga.v1.SagaService")]
database = ProtoReflectionDescriptorDatabase(channel)
pool = descriptor_pool.DescriptorPool(database)
service = pool.FindServiceByName("k1s0.system.saga.v1.SagaService")
out["reflected"] = sorted(service.methods_by_name)
request = message_factory.GetMessageClass(service.methods_by_name["GetSaga"].input_type)(saga_id=saga.saga_id)
reply = message_factory.GetMessageClass(service.methods_by_name["GetSaga"].output_type)
answer = channel.unary_unary("/k1s0.system.saga.v1.SagaService/GetSaga",
    request_serializer=type(request).SerializeToString,
    response_deserializer=reply.FromString)(request, timeout=10)
out["read_by_reflection"] = answer.saga.status
out["alive"] = start(pb.StartSagaRequest(workflow_name="order")).status
print(json.dumps(out))
"""


@pytest.fixture(name="seen")
async def _seen() -> Any:
    async with open_door() as door:
        door.house.answers["Payment.Charge"] = [HANGS]
        paths = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
        done = await trio.run_process(
            [sys.executable, "-c", CLIENT, str(door.front.port)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, "PYTHONPATH": paths, "GRPC_VERBOSITY": "ERROR"},
        )
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)


async def test_grpcio_sees_every_call_status_and_detail_as_the_contract_says(seen: dict[str, Any]) -> None:
    assert seen["initial"]["x-request-id"] == "r-1"
    assert seen["states"][0] == "RUNNING"
    assert seen["states"][-2:] == ["COMPENSATING", "CANCELLED"]
    assert seen["cancelled"].endswith("cancelled")

    def reason_of(name: str) -> tuple[str, str, str]:
        told = seen[name]
        info = told["details"]["ErrorInfo"]
        return told["code"], info["reason"], info["domain"]

    assert reason_of("terminal") == ("FAILED_PRECONDITION", "SYS_SAGA_CONFLICT", "saga")
    assert reason_of("unknown") == ("NOT_FOUND", "SYS_SAGA_NOT_FOUND", "saga")
    assert seen["unknown"]["request_id"] == "r-2"
    assert seen["unknown"]["message"] == "saga not found: x"
    assert reason_of("invalid") == ("INVALID_ARGUMENT", "SYS_SAGA_VALIDATION_ERROR", "saga")
    (violation,) = seen["invalid"]["details"]["BadRequest"]["fieldViolations"]
    assert (violation["field"], violation["description"]) == ("workflow_name", "expected 1 to 255 characters")
    assert reason_of("no_json") == ("INVALID_ARGUMENT", "SYS_SAGA_VALIDATION_ERROR", "saga")
    assert seen["no_json"]["details"]["BadRequest"]["fieldViolations"][0]["field"] == "payload"
    assert reason_of("garbage") == ("INVALID_ARGUMENT", "SYS_SAGA_VALIDATION_ERROR", "saga")
    assert reason_of("too_large") == ("RESOURCE_EXHAUSTED", "SYS_SAGA_PAYLOAD_TOO_LARGE", "saga")
    assert seen["compressed"] == "UNIMPLEMENTED"
    assert seen["no_method"] == "UNIMPLEMENTED"
    assert seen["health"] == [1, 1]
    assert "StartSaga" in seen["reflected"]
    assert seen["read_by_reflection"] == "CANCELLED"
    assert seen["alive"] == "STARTED"
