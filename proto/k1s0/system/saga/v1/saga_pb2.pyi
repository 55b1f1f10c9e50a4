from k1s0.system.common.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SagaStateProto(_message.Message):
    __slots__ = ("id", "workflow_name", "current_step", "status", "payload", "correlation_id", "initiated_by", "error_message", "created_at", "updated_at", "workflow_version", "compensation_failed", "attempt", "next_attempt_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_NAME_FIELD_NUMBER: _ClassVar[int]
    CURRENT_STEP_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    INITIATED_BY_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPENSATION_FAILED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NEXT_ATTEMPT_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    workflow_name: str
    current_step: int
    status: str
    payload: bytes
    correlation_id: str
    initiated_by: str
    error_message: str
    created_at: _types_pb2.Timestamp
    updated_at: _types_pb2.Timestamp
    workflow_version: int
    compensation_failed: bool
    attempt: int
    next_attempt_at: _types_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., workflow_name: _Optional[str] = ..., current_step: _Optional[int] = ..., status: _Optional[str] = ..., payload: _Optional[bytes] = ..., correlation_id: _Optional[str] = ..., initiated_by: _Optional[str] = ..., error_message: _Optional[str] = ..., created_at: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., updated_at: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., workflow_version: _Optional[int] = ..., compensation_failed: _Optional[bool] = ..., attempt: _Optional[int] = ..., next_attempt_at: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SagaStepLogProto(_message.Message):
    __slots__ = ("id", "saga_id", "step_index", "step_name", "action", "status", "request_payload", "response_payload", "error_message", "started_at", "completed_at", "attempts")
    ID_FIELD_NUMBER: _ClassVar[int]
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    STEP_NAME_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_AT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    saga_id: str
    step_index: int
    step_name: str
    action: str
    status: str
    request_payload: bytes
    response_payload: bytes
    error_message: str
    started_at: _types_pb2.Timestamp
    completed_at: _types_pb2.Timestamp
    attempts: int
    def __init__(self, id: _Optional[str] = ..., saga_id: _Optional[str] = ..., step_index: _Optional[int] = ..., step_name: _Optional[str] = ..., action: _Optional[str] = ..., status: _Optional[str] = ..., request_payload: _Optional[bytes] = ..., response_payload: _Optional[bytes] = ..., error_message: _Optional[str] = ..., started_at: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., completed_at: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., attempts: _Optional[int] = ...) -> None: ...

class WorkflowSummary(_message.Message):
    __slots__ = ("name", "step_count", "step_names", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    STEP_NAMES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    step_count: int
    step_names: _containers.RepeatedScalarFieldContainer[str]
    version: int
    def __init__(self, name: _Optional[str] = ..., step_count: _Optional[int] = ..., step_names: _Optional[_Iterable[str]] = ..., version: _Optional[int] = ...) -> None: ...

class StartSagaRequest(_message.Message):
    __slots__ = ("workflow_name", "payload", "correlation_id", "initiated_by")
    WORKFLOW_NAME_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    INITIATED_BY_FIELD_NUMBER: _ClassVar[int]
    workflow_name: str
    payload: bytes
    correlation_id: str
    initiated_by: str
    def __init__(self, workflow_name: _Optional[str] = ..., payload: _Optional[bytes] = ..., correlation_id: _Optional[str] = ..., initiated_by: _Optional[str] = ...) -> None: ...

class StartSagaResponse(_message.Message):
    __slots__ = ("saga_id", "status", "replayed")
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    saga_id: str
    status: str
    replayed: bool
    def __init__(self, saga_id: _Optional[str] = ..., status: _Optional[str] = ..., replayed: _Optional[bool] = ...) -> None: ...

class GetSagaRequest(_message.Message):
    __slots__ = ("saga_id", "wait_secs")
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECS_FIELD_NUMBER: _ClassVar[int]
    saga_id: str
    wait_secs: float
    def __init__(self, saga_id: _Optional[str] = ..., wait_secs: _Optional[float] = ...) -> None: ...

class GetSagaResponse(_message.Message):
    __slots__ = ("saga", "step_logs")
    SAGA_FIELD_NUMBER: _ClassVar[int]
    STEP_LOGS_FIELD_NUMBER: _ClassVar[int]
    saga: SagaStateProto
    step_logs: _containers.RepeatedCompositeFieldContainer[SagaStepLogProto]
    def __init__(self, saga: _Optional[_Union[SagaStateProto, _Mapping]] = ..., step_logs: _Optional[_Iterable[_Union[SagaStepLogProto, _Mapping]]] = ...) -> None: ...

class ListSagasRequest(_message.Message):
    __slots__ = ("pagination", "workflow_name", "status", "correlation_id", "compensation_failed", "created_after", "created_before", "cursor")
    PAGINATION_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CORRELATION_ID_FIELD_NUMBER: _ClassVar[int]
    COMPENSATION_FAILED_FIELD_NUMBER: _ClassVar[int]
    CREATED_AFTER_FIELD_NUMBER: _ClassVar[int]
    CREATED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    pagination: _types_pb2.Pagination
    workflow_name: str
    status: str
    correlation_id: str
    compensation_failed: bool
    created_after: _types_pb2.Timestamp
    created_before: _types_pb2.Timestamp
    cursor: str
    def __init__(self, pagination: _Optional[_Union[_types_pb2.Pagination, _Mapping]] = ..., workflow_name: _Optional[str] = ..., status: _Optional[str] = ..., correlation_id: _Optional[str] = ..., compensation_failed: _Optional[bool] = ..., created_after: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., created_before: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., cursor: _Optional[str] = ...) -> None: ...

class ListSagasResponse(_message.Message):
    __slots__ = ("sagas", "pagination")
    SAGAS_FIELD_NUMBER: _ClassVar[int]
    PAGINATION_FIELD_NUMBER: _ClassVar[int]
    sagas: _containers.RepeatedCompositeFieldContainer[SagaStateProto]
    pagination: _types_pb2.PaginationResult
    def __init__(self, sagas: _Optional[_Iterable[_Union[SagaStateProto, _Mapping]]] = ..., pagination: _Optional[_Union[_types_pb2.PaginationResult, _Mapping]] = ...) -> None: ...

class CancelSagaRequest(_message.Message):
    __slots__ = ("saga_id", "reason")
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    saga_id: str
    reason: str
    def __init__(self, saga_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class CancelSagaResponse(_message.Message):
    __slots__ = ("success", "message")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ...) -> None: ...

class RegisterWorkflowRequest(_message.Message):
    __slots__ = ("workflow_yaml",)
    WORKFLOW_YAML_FIELD_NUMBER: _ClassVar[int]
    workflow_yaml: str
    def __init__(self, workflow_yaml: _Optional[str] = ...) -> None: ...

class RegisterWorkflowResponse(_message.Message):
    __slots__ = ("name", "step_count", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    step_count: int
    version: int
    def __init__(self, name: _Optional[str] = ..., step_count: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class ListWorkflowsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkflowsResponse(_message.Message):
    __slots__ = ("workflows",)
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    workflows: _containers.RepeatedCompositeFieldContainer[WorkflowSummary]
    def __init__(self, workflows: _Optional[_Iterable[_Union[WorkflowSummary, _Mapping]]] = ...) -> None: ...

class WatchSagaRequest(_message.Message):
    __slots__ = ("saga_id",)
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    saga_id: str
    def __init__(self, saga_id: _Optional[str] = ...) -> None: ...

class WatchSagaResponse(_message.Message):
    __slots__ = ("saga",)
    SAGA_FIELD_NUMBER: _ClassVar[int]
    saga: SagaStateProto
    def __init__(self, saga: _Optional[_Union[SagaStateProto, _Mapping]] = ...) -> None: ...

class RetryCompensationRequest(_message.Message):
    __slots__ = ("saga_id", "steps")
    class StepsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: CompensationCorrection
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[CompensationCorrection, _Mapping]] = ...) -> None: ...
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    saga_id: str
    steps: _containers.MessageMap[str, CompensationCorrection]
    def __init__(self, saga_id: _Optional[str] = ..., steps: _Optional[_Mapping[str, CompensationCorrection]] = ...) -> None: ...

class CompensationCorrection(_message.Message):
    __slots__ = ("input", "mark_done", "reason")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    MARK_DONE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    input: bytes
    mark_done: bool
    reason: str
    def __init__(self, input: _Optional[bytes] = ..., mark_done: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class RetryCompensationResponse(_message.Message):
    __slots__ = ("saga_id", "status")
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    saga_id: str
    status: str
    def __init__(self, saga_id: _Optional[str] = ..., status: _Optional[str] = ...) -> None: ...

class GetWorkflowRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetWorkflowResponse(_message.Message):
    __slots__ = ("workflow", "definition")
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    workflow: WorkflowSummary
    definition: bytes
    def __init__(self, workflow: _Optional[_Union[WorkflowSummary, _Mapping]] = ..., definition: _Optional[bytes] = ...) -> None: ...

class ListAuditRequest(_message.Message):
    __slots__ = ("page_size", "saga_id", "principal", "action", "created_after", "created_before", "cursor")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    CREATED_AFTER_FIELD_NUMBER: _ClassVar[int]
    CREATED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    saga_id: str
    principal: str
    action: str
    created_after: _types_pb2.Timestamp
    created_before: _types_pb2.Timestamp
    cursor: str
    def __init__(self, page_size: _Optional[int] = ..., saga_id: _Optional[str] = ..., principal: _Optional[str] = ..., action: _Optional[str] = ..., created_after: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., created_before: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., cursor: _Optional[str] = ...) -> None: ...

class ListAuditResponse(_message.Message):
    __slots__ = ("entries", "next_cursor")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[AuditEntryProto]
    next_cursor: str
    def __init__(self, entries: _Optional[_Iterable[_Union[AuditEntryProto, _Mapping]]] = ..., next_cursor: _Optional[str] = ...) -> None: ...

class AuditEntryProto(_message.Message):
    __slots__ = ("id", "created_at", "action", "outcome", "principal", "roles", "door", "address", "request_id", "saga_id", "workflow_name", "workflow_version", "step_name", "reason", "before", "after")
    ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    DOOR_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAGA_ID_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_NAME_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_NAME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    id: str
    created_at: _types_pb2.Timestamp
    action: str
    outcome: str
    principal: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    door: str
    address: str
    request_id: str
    saga_id: str
    workflow_name: str
    workflow_version: int
    step_name: str
    reason: str
    before: bytes
    after: bytes
    def __init__(self, id: _Optional[str] = ..., created_at: _Optional[_Union[_types_pb2.Timestamp, _Mapping]] = ..., action: _Optional[str] = ..., outcome: _Optional[str] = ..., principal: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ..., door: _Optional[str] = ..., address: _Optional[str] = ..., request_id: _Optional[str] = ..., saga_id: _Optional[str] = ..., workflow_name: _Optional[str] = ..., workflow_version: _Optional[int] = ..., step_name: _Optional[str] = ..., reason: _Optional[str] = ..., before: _Optional[bytes] = ..., after: _Optional[bytes] = ...) -> None: ...
