"""`saga serve` with an `auth` section, spoken to by REST and by grpcio, and its issuer away when it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.server.test_readiness import readyz, serves, told_by_metrics, until
from tests.support.issuer import Issuer, issuer, token, token_of
from tests.support.scrape import scrape
from tests.support.server_process import ROOT, server_process

CLIENT = r"""
import json, sys
import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from k1s0.system.saga.v1 import saga_pb2 as pb

port, tokens = sys.argv[1], json.loads(sys.stdin.read())
channel = grpc.insecure_channel(f"127.0.0.1:{port}")
list_sagas = channel.unary_unary("/k1s0.system.saga.v1.SagaService/ListSagas",
    request_serializer=pb.ListSagasRequest.SerializeToString,
    response_deserializer=pb.ListSagasResponse.FromString)
register = channel.unary_unary("/k1s0.system.saga.v1.SagaService/RegisterWorkflow",
    request_serializer=pb.RegisterWorkflowRequest.SerializeToString,
    response_deserializer=pb.RegisterWorkflowResponse.FromString)

def told(call, request, *values):
    try:
        call(request, timeout=20, metadata=[("authorization", value) for value in values])
    except grpc.RpcError as error:
        status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        return [error.code().name, info.reason, info.domain]
    return "OK"

nothing = pb.ListSagasRequest()
bad = pb.RegisterWorkflowRequest(workflow_yaml="name: x")
good = "Bearer " + tokens["auditor"]
print(json.dumps({
    "none": told(list_sagas, nothing),
    "auditor reads": told(list_sagas, nothing, good),
    "auditor writes": told(register, bad, good),
    "operator writes": told(register, bad, "Bearer " + tokens["operator"]),
    "twice": told(list_sagas, nothing, good, good),
    "wrong audience": told(list_sagas, nothing, "Bearer " + tokens["wrong audience"]),
    "expired": told(list_sagas, nothing, "Bearer " + tokens["expired"]),
    "health": health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20).status,
}))
"""


def config_for(idp: Issuer) -> dict[str, Any]:
    return {"auth": idp.settings(), "observability": {"log": {"level": "debug"}}}


def test_a_server_that_starts_without_its_issuer_serves_when_that_is_there_and_never_logs_a_token(
    tmp_path: Path,
) -> None:
    tokens = {
        "auditor": token_of("sys_auditor"),
        "operator": token_of("sys_operator"),
        "wrong audience": token(aud="shop"),
        "expired": token(exp=1),
    }
    with issuer() as idp, server_process(tmp_path, config_for(idp)) as server:
        idp.status = 500
        server.spawn()
        until(lambda: " ready rest=" in server.log, server)
        until(lambda: readyz(server) == (503, "unhealthy", {"keys": "missing"}), server)
        assert not serves(server)
        until(lambda: told_by_metrics(server) == {"keys"}, server)
        assert "\nsaga_jwks_fetched_timestamp_seconds 0.0" in scrape(server)
        assert 'saga_jwks_fetches_total{outcome="ok"} 0.0' in scrape(server)
        headers = {"Authorization": f"Bearer {tokens['auditor']}"}
        status, answer = server.call("GET", "/api/v1/sagas", **headers)
        assert (status, answer["error"]["code"]) == (503, "SYS_SAGA_UNAVAILABLE")
        assert server.call("GET", "/api/v1/sagas")[0] == 401
        assert f'jwks_unavailable url={idp.url} known_keys=0 error="status 500"' in server.log

        idp.asked.clear()
        idp.status = 200
        assert idp.asked.wait(60), server.log
        while (status := server.call("GET", "/api/v1/sagas", **headers)[0]) != 200:
            assert status == 503  # it has asked, and is about to know
        assert readyz(server) == (200, "healthy", {})
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(server.grpc_port)],
            input=json.dumps(tokens).encode(),
            capture_output=True,
            check=False,
            timeout=120,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "proto"))),
                "GRPC_VERBOSITY": "ERROR",
            },
        )
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(done.stdout) == {
            "none": ["UNAUTHENTICATED", "SYS_AUTH_MISSING_TOKEN", "saga"],
            "auditor reads": "OK",
            "auditor writes": ["PERMISSION_DENIED", "SYS_AUTH_PERMISSION_DENIED", "saga"],
            "operator writes": ["INVALID_ARGUMENT", "SYS_SAGA_VALIDATION_ERROR", "saga"],
            "twice": ["UNAUTHENTICATED", "SYS_AUTH_TOKEN_INVALID", "saga"],
            "wrong audience": ["UNAUTHENTICATED", "SYS_AUTH_TOKEN_INVALID", "saga"],
            "expired": ["UNAUTHENTICATED", "SYS_AUTH_TOKEN_EXPIRED", "saga"],
            "health": 1,
        }
        # Its issuer is away again; who was known stays so.
        idp.status = 500
        assert server.call("GET", "/api/v1/sagas", **headers)[0] == 200
        for each in tokens.values():
            for part in each.split("."):
                assert part not in server.log
        assert f"jwks_loaded url={idp.url} keys=5" in server.log


def test_a_server_whose_issuer_answers_is_ready_from_its_first_moment_on(tmp_path: Path) -> None:
    with issuer() as idp, server_process(tmp_path, config_for(idp)) as server:
        server.start()
        assert idp.served == 1
        assert "readiness_changed" not in server.log
