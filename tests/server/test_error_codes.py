"""One error, two doors: what the table says is what a client of either is told (spec sections 4 and 5)."""

from __future__ import annotations

import inspect
from pathlib import Path

import httpx
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpclib.client import Channel
from grpclib.encoding.proto import ProtoStatusDetailsCodec
from grpclib.exceptions import GRPCError
from k1s0.system.saga.v1 import saga_pb2 as pb
from k1s0.system.saga.v1.saga_grpc import SagaServiceStub

import saga.errors
from bridge import run_aio
from saga.error_codes import ERROR_CODES, INTERNAL_MESSAGE
from saga.errors import MappingFailed, MissingToken, RequestError, SagaError, TokenExpired, Unauthenticated
from tests.support.doors import open_doors

NEVER_RAISED = {SagaError, RequestError, Unauthenticated}
"""Bases whose errors are always something more exact."""

SPECIFIED = {
    "SYS_SAGA_NOT_FOUND": {(404, "NOT_FOUND")},
    "SYS_SAGA_VALIDATION_ERROR": {(400, "INVALID_ARGUMENT")},
    "SYS_SAGA_CONFLICT": {(409, "FAILED_PRECONDITION")},
    "SYS_SAGA_INTERNAL_ERROR": {(500, "INTERNAL")},
    "SYS_SAGA_PAYLOAD_TOO_LARGE": {(413, "RESOURCE_EXHAUSTED")},
    "SYS_SAGA_UNAVAILABLE": {(503, "UNAVAILABLE"), (503, "RESOURCE_EXHAUSTED")},
    "SYS_AUTH_MISSING_TOKEN": {(401, "UNAUTHENTICATED")},
    "SYS_AUTH_TOKEN_INVALID": {(401, "UNAUTHENTICATED")},
    "SYS_AUTH_TOKEN_EXPIRED": {(401, "UNAUTHENTICATED")},
    "SYS_AUTH_PERMISSION_DENIED": {(403, "PERMISSION_DENIED")},
}


def an_error(cls: type[Exception]) -> Exception:
    if cls in (MissingToken, TokenExpired):
        return cls()
    return cls("input.sku", "is null") if cls is MappingFailed else cls("that went wrong")


def test_every_error_of_the_domain_is_in_the_table() -> None:
    declared = {cls for _, cls in inspect.getmembers(saga.errors, inspect.isclass) if issubclass(cls, SagaError)}
    assert declared - NEVER_RAISED == set(ERROR_CODES) - {Exception}


def test_the_table_is_that_of_the_specification() -> None:
    found: dict[str, set[tuple[int, str]]] = {}
    for told in ERROR_CODES.values():
        found.setdefault(told.code, set()).add((told.http_status, told.grpc_status))
    assert found == SPECIFIED


async def test_both_doors_answer_each_error_by_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: Exception = LookupError()

    async def refuse(saga_id: str) -> None:
        raise raised

    async def asked(port: int) -> GRPCError:
        async with Channel("127.0.0.1", port, status_details_codec=ProtoStatusDetailsCodec()) as channel:
            with pytest.raises(GRPCError) as caught:
                await SagaServiceStub(channel).GetSaga(pb.GetSagaRequest(saga_id=saga_id), timeout=20)
            return caught.value

    async with open_doors(tmp_path) as doors, httpx.AsyncClient(timeout=20) as client:
        saga_id = "00000000-0000-4000-8000-000000000000"
        monkeypatch.setattr(doors.house.store, "get", refuse)
        for cls, expected in ERROR_CODES.items():
            raised = an_error(cls)
            message = INTERNAL_MESSAGE if expected.http_status == 500 else str(raised)

            over_http = await client.get(f"http://127.0.0.1:{doors.rest_port}/api/v1/sagas/{saga_id}")
            body = over_http.json()["error"]
            assert (over_http.status_code, body["code"], body["message"]) == (
                expected.http_status,
                expected.code,
                message,
            )

            over_grpc = await run_aio(asked(doors.grpc_port))
            details = list(over_grpc.details or ())
            (info,) = (detail for detail in details if isinstance(detail, ErrorInfo))
            assert (over_grpc.status.name, info.reason, over_grpc.message) == (
                expected.grpc_status,
                expected.code,
                message,
            )
            waits = any(isinstance(detail, RetryInfo) for detail in details)
            assert ("Retry-After" in over_http.headers) == waits == (expected.http_status == 503), cls
