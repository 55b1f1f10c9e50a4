"""The contract of `proto/`: what is checked in is what the .proto files say, and the numbers are those of the spec."""

from __future__ import annotations

import enum
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from k1s0.system.common.v1 import types_pb2
from k1s0.system.saga.v1 import saga_pb2 as pb

from saga.audit import AuditAction, AuditOutcome, Door
from saga.model import SagaStatus, StepAction, StepStatus
from server.protogen import PROTO_ROOT, generate

SPEC = {
    types_pb2.Timestamp: {"seconds": 1, "nanos": 2},
    types_pb2.Pagination: {"page": 1, "page_size": 2},
    types_pb2.PaginationResult: {"total_count": 1, "page": 2, "page_size": 3, "has_next": 4},
    pb.StartSagaRequest: {"workflow_name": 1, "payload": 2, "correlation_id": 3, "initiated_by": 4},
    pb.StartSagaResponse: {"saga_id": 1, "status": 2},
    pb.GetSagaRequest: {"saga_id": 1},
    pb.GetSagaResponse: {"saga": 1, "step_logs": 2},
    pb.ListSagasRequest: {"pagination": 1, "workflow_name": 2, "status": 3, "correlation_id": 4},
    pb.ListSagasResponse: {"sagas": 1, "pagination": 2},
    pb.CancelSagaRequest: {"saga_id": 1},
    pb.CancelSagaResponse: {"success": 1, "message": 2},
    pb.RegisterWorkflowRequest: {"workflow_yaml": 1},
    pb.RegisterWorkflowResponse: {"name": 1, "step_count": 2},
    pb.ListWorkflowsRequest: {},
    pb.ListWorkflowsResponse: {"workflows": 1},
    pb.WorkflowSummary: {"name": 1, "step_count": 2, "step_names": 3},
    pb.SagaStateProto: {
        "id": 1,
        "workflow_name": 2,
        "current_step": 3,
        "status": 4,
        "payload": 5,
        "correlation_id": 6,
        "initiated_by": 7,
        "error_message": 8,
        "created_at": 9,
        "updated_at": 10,
    },
    pb.SagaStepLogProto: {
        "id": 1,
        "saga_id": 2,
        "step_index": 3,
        "step_name": 4,
        "action": 5,
        "status": 6,
        "request_payload": 7,
        "response_payload": 8,
        "error_message": 9,
        "started_at": 10,
        "completed_at": 11,
    },
}
"""Section 5 and the seed, to the letter."""

TYPES = {
    "Timestamp.seconds": FieldDescriptor.TYPE_INT64,
    "Timestamp.nanos": FieldDescriptor.TYPE_INT32,
    "PaginationResult.total_count": FieldDescriptor.TYPE_INT64,
    "PaginationResult.page": FieldDescriptor.TYPE_INT32,
    "PaginationResult.has_next": FieldDescriptor.TYPE_BOOL,
    "StartSagaRequest.payload": FieldDescriptor.TYPE_BYTES,
    "SagaStateProto.payload": FieldDescriptor.TYPE_BYTES,
    "SagaStateProto.current_step": FieldDescriptor.TYPE_INT32,
    "SagaStateProto.status": FieldDescriptor.TYPE_STRING,
    "SagaStepLogProto.request_payload": FieldDescriptor.TYPE_BYTES,
    "CancelSagaResponse.success": FieldDescriptor.TYPE_BOOL,
    "RegisterWorkflowResponse.step_count": FieldDescriptor.TYPE_INT32,
}


def test_the_generated_code_is_what_the_proto_files_say(tmp_path: Path) -> None:
    sources = generate(tmp_path)
    assert [source.name for source in sources] == ["types.proto", "saga.proto"]
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    checked_in = {path.relative_to(PROTO_ROOT): path.read_text() for path in PROTO_ROOT.rglob("*_pb2.py*")}
    checked_in |= {path.relative_to(PROTO_ROOT): path.read_text() for path in PROTO_ROOT.rglob("*_grpc.py")}
    assert fresh.keys() == checked_in.keys()
    stale = [str(path) for path in fresh if fresh[path] != checked_in[path]]
    assert not stale, f"run `make proto`: {stale}"


def test_a_proto_file_that_protoc_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "broken.proto").write_text('syntax = "proto3"; message {')
    with pytest.raises(RuntimeError, match=r"broken\.proto.*Expected message name"):
        generate(tmp_path, tmp_path)


@pytest.mark.parametrize("message", SPEC, ids=lambda message: message.DESCRIPTOR.name)
def test_field_numbers_are_those_of_the_spec_and_new_fields_have_new_numbers(message: type) -> None:
    numbers = {field.name: field.number for field in message.DESCRIPTOR.fields}  # type: ignore[attr-defined]  # generated
    spec = SPEC[message]
    assert {name: numbers.get(name) for name in spec} == spec
    added = [number for name, number in numbers.items() if name not in spec]
    assert all(number > max(spec.values(), default=0) for number in added)


def test_field_types_are_those_of_the_spec() -> None:
    found = {
        f"{message.DESCRIPTOR.name}.{field.name}": field.type for message in SPEC for field in message.DESCRIPTOR.fields
    }
    assert {name: found[name] for name in TYPES} == TYPES


def test_packages_and_methods_are_those_of_the_spec() -> None:
    assert pb.DESCRIPTOR.package == "k1s0.system.saga.v1"
    assert types_pb2.DESCRIPTOR.package == "k1s0.system.common.v1"
    methods = {method.name: method for method in pb.DESCRIPTOR.services_by_name["SagaService"].methods}
    assert {
        "StartSaga",
        "GetSaga",
        "ListSagas",
        "CancelSaga",
        "RegisterWorkflow",
        "ListWorkflows",
        "WatchSaga",
    } <= methods.keys()
    assert [name for name, method in methods.items() if method.server_streaming] == ["WatchSaga"]
    assert not any(method.client_streaming for method in methods.values())


@pytest.mark.parametrize(
    "words", [SagaStatus, StepAction, StepStatus, AuditAction, AuditOutcome, Door], ids=lambda words: words.__name__
)
def test_the_words_of_the_model_stand_in_the_contract(words: type[enum.StrEnum]) -> None:
    text = (PROTO_ROOT / "k1s0/system/saga/v1/saga.proto").read_text()
    assert not [word.value for word in words if word.value not in text]


def test_the_contract_tells_participants_what_they_must_keep_to() -> None:
    text = (PROTO_ROOT / "k1s0/system/saga/v1/saga.proto").read_text()
    for promise in ("AT LEAST once", "idempotency-key", "NEVER RAN", "BEFORE the action", "saga-epoch", "RetryInfo"):
        assert promise in text
