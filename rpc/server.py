"""The gRPC door: parses a request, calls `SagaService`, maps the answer. What a client may ask for is decided there.

grpclib runs the methods of `Servicer` on asyncio; each crosses to Trio once a call (a watch: once a message). What an
error becomes is `server_errors.py`, messages are `wire.py`, stopping is `draining.py`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Literal, TypeVar

import msgspec
import trio
from google.protobuf.message import Message
from grpclib.const import Status
from grpclib.encoding.proto import ProtoCodec, ProtoStatusDetailsCodec
from grpclib.exceptions import StreamTerminatedError
from grpclib.health.check import ServiceCheck, ServiceStatus
from grpclib.health.service import OVERALL, Health
from grpclib.reflection.service import ServerReflection
from grpclib.server import Stream
from k1s0.system.common.v1.types_pb2 import PaginationResult
from k1s0.system.saga.v1 import saga_pb2 as pb
from k1s0.system.saga.v1.saga_grpc import SagaServiceBase

from bridge import call_trio, run_aio
from rpc import wire
from rpc.draining import WINDOWS, DrainingServer
from rpc.handshakes import Context
from rpc.inbound import receive
from rpc.open_services import Guarded
from rpc.outbound import send
from rpc.server_errors import ShuttingDown, failure
from saga.access import NOBODY, Permission, Principal, require, single_authorization
from saga.audit import AuditAction, AuditFilter, Door, Requester, requester
from saga.audit_trail import DEFAULT_PAGE_SIZE as AUDIT_PAGE_SIZE
from saga.authentication import Authenticator
from saga.door_limits import BodyRoom, DoorLimits
from saga.drain import Drain
from saga.errors import Detail, PermissionDenied, TokenExpired, Unavailable
from saga.log_fields import about
from saga.meter import Meter
from saga.model import SagaStatus
from saga.ports import SagaFilter
from saga.readiness import Readiness
from saga.request_id import request_id
from saga.request_span import RequestSpan
from saga.service import MAX_WAIT_SECS, SagaService, StartSaga, Watch
from saga.tracing import Attribute, Tracer, read_traceparent, single_traceparent
from saga.uncancelled import uncancelled
from saga.workflow_yaml import MAX_YAML_BYTES

log = logging.getLogger("saga.rpc.server")

MESSAGE_SLACK_BYTES = 64 * 1024
"""What a request may have beside its payload or its workflow."""
DEFAULT_PAGE_SIZE = 20
HEALTH_KEPT_SECS = 1.0
"""How long a health answer is given again before the store is asked anew: probes come often and from many sides."""
HEALTH_CHECK_SECS = 5.0
STOP_SECS = 5.0
"""Bound on closing the server when it was not drained before; more than `draining.py` ever takes."""

OUR_FAULT = frozenset({Status.UNKNOWN, Status.INTERNAL, Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.DATA_LOSS})
"""Statuses with which a call of ours has failed in the eyes of a trace; the others tell the caller something."""

PERMISSIONS: Mapping[str, Permission] = {
    "StartSaga": Permission.WRITE_SAGAS,
    "GetSaga": Permission.READ_SAGAS,
    "ListSagas": Permission.READ_SAGAS,
    "CancelSaga": Permission.WRITE_SAGAS,
    "RetryCompensation": Permission.WRITE_SAGAS,
    "WatchSaga": Permission.READ_SAGAS,
    "RegisterWorkflow": Permission.WRITE_WORKFLOWS,
    "ListWorkflows": Permission.READ_WORKFLOWS,
    "GetWorkflow": Permission.READ_WORKFLOWS,
    "ListAudit": Permission.READ_AUDIT,
}
"""What each method asks of its caller. Health and reflection are open: the one is what probes read, the other says no
more than `/openapi.json`."""

AUDITED: Mapping[str, AuditAction] = {
    "StartSaga": AuditAction.START_SAGA,
    "CancelSaga": AuditAction.CANCEL_SAGA,
    "RetryCompensation": AuditAction.RETRY_COMPENSATION,
    "RegisterWorkflow": AuditAction.REGISTER_WORKFLOW,
}
"""What the audit log calls the methods that change something."""

M = TypeVar("M", bound=Message)


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """What the metadata of a call says, and the address of its peer."""

    request_id: str
    principal: Principal = NOBODY
    idempotency_key: str | None
    traceparent: str | None
    tracestate: str | None = None
    span: RequestSpan | None = None
    address: str | None = None

    @property
    def asked_by(self) -> Requester:
        """Who asks, for the audit log."""
        return requester(self.principal, Door.GRPC, address=self.address, request_id=self.request_id)


class Servicer(SagaServiceBase):
    """`k1s0.system.saga.v1.SagaService`."""

    def __init__(
        self,
        service: SagaService,
        authenticator: Authenticator,
        drain: Drain,
        meter: Meter,
        tracer: Tracer,
        limits: DoorLimits,
    ) -> None:
        self._bodies = BodyRoom(limits.max_body_bytes)
        self._answers = BodyRoom(limits.max_answer_bytes, "large answers")
        self._service = service
        self._authenticator = authenticator
        self._tracer = tracer
        self._drain = drain
        self._meter = meter
        self._max_bytes = max(service.max_payload_bytes, MAX_YAML_BYTES) + MESSAGE_SLACK_BYTES

    # --- the methods, as grpclib calls them ---------------------------------------------------------------------------

    async def StartSaga(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "StartSaga", pb.StartSagaRequest, self._start)

    async def GetSaga(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "GetSaga", pb.GetSagaRequest, self._get)

    async def ListSagas(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "ListSagas", pb.ListSagasRequest, self._list)

    async def CancelSaga(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "CancelSaga", pb.CancelSagaRequest, self._cancel)

    async def RetryCompensation(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "RetryCompensation", pb.RetryCompensationRequest, self._retry_compensation)

    async def RegisterWorkflow(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "RegisterWorkflow", pb.RegisterWorkflowRequest, self._register_workflow)

    async def ListWorkflows(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "ListWorkflows", pb.ListWorkflowsRequest, self._list_workflows)

    async def GetWorkflow(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "GetWorkflow", pb.GetWorkflowRequest, self._get_workflow)

    async def ListAudit(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "ListAudit", pb.ListAuditRequest, self._list_audit)

    async def WatchSaga(self, stream: Stream[Any, Any]) -> None:
        async def states(caller: Caller) -> None:
            request = await receive(stream, pb.WatchSagaRequest, self._max_bytes, self._bodies)
            with self._service.watch(request.saga_id) as watch:
                while (state := await call_trio(self._next_state, watch, caller.principal)) is not None:
                    if not stream._send_initial_metadata_done:
                        await stream.send_initial_metadata(metadata={"x-request-id": caller.request_id})
                    await send(stream, pb.WatchSagaResponse(saga=state), self._answers)

        await self._answered(stream, "WatchSaga", states)

    async def _unary(
        self,
        stream: Stream[Any, Any],
        method: str,
        request_type: type[M],
        call: Callable[[M, Caller], Awaitable[Message]],
    ) -> None:
        async def answer(caller: Caller) -> None:
            reply = await call_trio(call, await receive(stream, request_type, self._max_bytes, self._bodies), caller)
            await stream.send_initial_metadata(metadata={"x-request-id": caller.request_id})
            await send(stream, reply, self._answers)

        await self._answered(stream, method, answer)

    async def _answered(
        self, stream: Stream[Any, Any], method: str, answer: Callable[[Caller], Awaitable[None]]
    ) -> None:
        """Runs `answer`; an error becomes the status, details and trailers the client gets."""
        metadata: Mapping[str, str | bytes] = stream.metadata or {}
        traceparent = single_traceparent(_all(stream.metadata, "traceparent"))
        tracestate = ",".join(_all(stream.metadata, "tracestate"))
        caller = Caller(
            request_id=request_id(_text(metadata.get("x-request-id"))),
            idempotency_key=_text(metadata.get("idempotency-key")),
            traceparent=traceparent,
            tracestate=tracestate,
            span=RequestSpan(self._tracer, traceparent, tracestate) if self._tracer.enabled else None,
            address=_address(stream),
        )
        context = read_traceparent(traceparent)
        with about(request_id=caller.request_id, **({} if context is None else {"trace_id": context.trace_id})):
            await self._told(stream, method, caller, answer)

    async def _told(
        self, stream: Stream[Any, Any], method: str, caller: Caller, answer: Callable[[Caller], Awaitable[None]]
    ) -> None:
        started = time.perf_counter()
        status = Status.CANCELLED  # what it is when the client went away, or its deadline passed, on the way
        try:
            caller = msgspec.structs.replace(caller, principal=await self._principal(stream))
            await self._require(caller, method)
            await answer(caller)
            status = Status.OK
        except StreamTerminatedError:
            raise  # nobody is there to be told
        except Exception as error:
            told = failure(error)
            status = told.status
            if status is Status.INTERNAL:
                log.exception("grpc_error method=%s request_id=%s", method, caller.request_id)
            elif status in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
                log.info("access_refused method=%s request_id=%s reason=%s", method, caller.request_id, error)
            elif isinstance(error, Unavailable):
                log.info("grpc_unavailable method=%s request_id=%s error=%s", method, caller.request_id, error)
            await stream.send_trailing_metadata(
                status=told.status,
                status_message=told.message,
                status_details=told.details,
                metadata={"x-request-id": caller.request_id},
            )
        finally:
            seconds = time.perf_counter() - started
            self._meter.grpc_call_served(method, status.name, seconds)
            principal = caller.principal.subject if caller.principal.is_identified else None
            log.info(
                "grpc_call method=%s code=%s ms=%.1f peer=%s principal=%s request_id=%s",
                *(method, status.name, seconds * 1000, caller.address, principal, caller.request_id),
            )
            if caller.span is not None:
                _end_span(caller.span, method, status, seconds, caller.request_id)

    async def _principal(self, stream: Stream[Any, Any]) -> Principal:
        """Who calls; asked before their message is read."""
        authorization = single_authorization(_all(stream.metadata, "authorization"))
        principal = self._authenticator.recognized(authorization)
        if principal is None:
            principal = await call_trio(self._authenticator.authenticate, authorization)
        return principal

    async def _require(self, caller: Caller, method: str) -> None:
        """Returns if the caller may. A method nobody declared anything about is ours to mend, and works for nobody."""
        try:
            require(caller.principal, PERMISSIONS[method])
        except PermissionDenied:
            if method in AUDITED:
                await call_trio(self._service.audit.note_denied, caller.asked_by, AUDITED[method])
            raise

    # --- what each method does, on Trio -------------------------------------------------------------------------------

    async def _start(self, request: pb.StartSagaRequest, caller: Caller) -> pb.StartSagaResponse:
        faults: list[Detail] = []
        payload = wire.json_object("payload", request.payload, faults)
        wire.refuse_if_faulty(faults)
        started = await uncancelled(
            self._service.start,
            StartSaga(
                workflow_name=request.workflow_name,
                payload=payload,
                correlation_id=request.correlation_id or None,
                initiated_by=request.initiated_by or None,
                idempotency_key=caller.idempotency_key,
                traceparent=caller.traceparent,
                tracestate=caller.tracestate,
                span_id=None if caller.span is None else caller.span.span_id,
            ),
            caller.asked_by,
        )
        if caller.span is not None:
            caller.span.joins(started.saga)
        # A replay is answered as the first request was, however far the saga has come since.
        return pb.StartSagaResponse(
            saga_id=started.saga.saga_id, status=SagaStatus.STARTED.value, replayed=started.replayed
        )

    async def _get(self, request: pb.GetSagaRequest, caller: Caller) -> pb.GetSagaResponse:
        wait_secs = request.wait_secs
        if not (math.isfinite(wait_secs) and 0 <= wait_secs <= MAX_WAIT_SECS):
            message = f"expected a number from 0 to {MAX_WAIT_SECS:g}"
            wire.refuse_if_faulty([Detail(field="wait_secs", reason="out_of_range", message=message)])
        with self._drain.ends_early() as stop, trio.move_on_at(caller.principal.ends_at) as expiry:
            detail = await self._service.get(request.saga_id, wait_secs=wait_secs)
        if stop.cancelled_caught or expiry.cancelled_caught:
            detail = await self._service.get(request.saga_id)
        return pb.GetSagaResponse(
            saga=wire.saga_state(detail.saga), step_logs=[wire.step_log(entry) for entry in detail.step_logs]
        )

    async def _list(self, request: pb.ListSagasRequest, caller: Caller) -> pb.ListSagasResponse:
        faults: list[Detail] = []
        where = SagaFilter(
            workflow_name=request.workflow_name or None,
            status=wire.named(SagaStatus, "status", request.status, faults),
            correlation_id=request.correlation_id or None,
            compensation_failed=request.compensation_failed if request.HasField("compensation_failed") else None,
            created_after=_instant(request, "created_after", faults),
            created_before=_instant(request, "created_before", faults),
        )
        wire.refuse_if_faulty(faults)
        page = await self._service.list_sagas(
            where,
            page=request.pagination.page or 1,
            page_size=request.pagination.page_size or DEFAULT_PAGE_SIZE,
            cursor=request.cursor or None,
        )
        return pb.ListSagasResponse(
            sagas=[wire.saga_state(saga) for saga in page.sagas],
            pagination=PaginationResult(
                total_count=page.total_count,
                page=page.page,
                page_size=page.page_size,
                has_next=page.has_next,
                next_cursor=page.next_cursor or "",
            ),
        )

    async def _cancel(self, request: pb.CancelSagaRequest, caller: Caller) -> pb.CancelSagaResponse:
        saga = await uncancelled(self._service.cancel, request.saga_id, caller.asked_by)
        return pb.CancelSagaResponse(success=True, message=f"saga {saga.saga_id} cancelled")

    async def _retry_compensation(
        self, request: pb.RetryCompensationRequest, caller: Caller
    ) -> pb.RetryCompensationResponse:
        steps = {name: wire.correction(entry) for name, entry in request.steps.items()}
        saga = await uncancelled(self._service.retry_compensation, request.saga_id, steps, caller.asked_by)
        return pb.RetryCompensationResponse(saga_id=saga.saga_id, status=saga.status.value)

    async def _register_workflow(
        self, request: pb.RegisterWorkflowRequest, caller: Caller
    ) -> pb.RegisterWorkflowResponse:
        registered = await uncancelled(self._service.register_workflow, request.workflow_yaml, caller.asked_by)
        workflow = registered.workflow
        return pb.RegisterWorkflowResponse(
            name=workflow.definition.name, step_count=len(workflow.definition.steps), version=workflow.version
        )

    async def _list_workflows(self, request: pb.ListWorkflowsRequest, caller: Caller) -> pb.ListWorkflowsResponse:
        return pb.ListWorkflowsResponse(
            workflows=[wire.workflow_summary(workflow) for workflow in await self._service.workflows()]
        )

    async def _get_workflow(self, request: pb.GetWorkflowRequest, caller: Caller) -> pb.GetWorkflowResponse:
        workflow = await self._service.workflow(request.name)
        return pb.GetWorkflowResponse(
            workflow=wire.workflow_summary(workflow), definition=wire.workflow_definition(workflow)
        )

    async def _list_audit(self, request: pb.ListAuditRequest, caller: Caller) -> pb.ListAuditResponse:
        faults: list[Detail] = []
        where = AuditFilter(
            saga_id=request.saga_id or None,
            principal=request.principal or None,
            action=wire.named(AuditAction, "action", request.action, faults),
            created_after=_instant(request, "created_after", faults),
            created_before=_instant(request, "created_before", faults),
        )
        wire.refuse_if_faulty(faults)
        page = await self._service.audit.entries(
            where, page_size=request.page_size or AUDIT_PAGE_SIZE, cursor=request.cursor or None
        )
        return pb.ListAuditResponse(
            entries=[wire.audit_entry(entry) for entry in page.entries], next_cursor=page.next_cursor or ""
        )

    async def _next_state(self, watch: Watch, principal: Principal) -> pb.SagaStateProto | None:
        with self._drain.ends_early() as stop, trio.move_on_at(principal.ends_at) as expiry:
            saga = await watch.next()
        if expiry.cancelled_caught:
            raise TokenExpired
        if stop.cancelled_caught:
            raise ShuttingDown("the server is shutting down; watch again")
        return None if saga is None else wire.saga_state(saga)


def _end_span(span: RequestSpan, method: str, status: Status, seconds: float, known_as: str) -> None:
    called = f"{pb.DESCRIPTOR.package}.SagaService/{method}"
    attributes: dict[str, Attribute] = {
        "rpc.system.name": "grpc",
        "rpc.method": called,
        "rpc.response.status_code": status.name,
        "saga.request_id": known_as,
    }
    span.end(called, seconds, attributes, status.name if status in OUR_FAULT else None)


def _all(metadata: Any, name: str) -> list[str]:
    """Every value of a key, in order."""
    return [] if metadata is None else [value for value in metadata.getall(name, ()) if isinstance(value, str)]


def _instant(
    request: pb.ListSagasRequest | pb.ListAuditRequest,
    field: Literal["created_after", "created_before"],
    faults: list[Detail],
) -> datetime | None:
    return wire.instant(field, getattr(request, field), faults) if request.HasField(field) else None


def _address(stream: Stream[Any, Any]) -> str | None:
    peer = stream.peer
    found = None if peer is None else peer.addr()
    return found[0] if isinstance(found, tuple) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


class GrpcFront:
    """The running server. `port` is where it listens."""

    def __init__(self, server: DrainingServer, serving: ServiceStatus) -> None:
        self._server = server
        self._serving = serving
        self._stopped = False
        self.port = server.port

    async def drain(self, grace_secs: float) -> None:
        """Stops: health says NOT_SERVING, new calls get UNAVAILABLE, running ones have `grace_secs`. Once is enough."""
        if not self._stopped:
            self._stopped = True
            self._serving.set(False)
            await run_aio(self._server.drain(grace_secs))


@asynccontextmanager
async def serve_grpc(
    service: SagaService,
    host: str,
    port: int,
    *,
    authenticator: Authenticator,
    drain: Drain,
    meter: Meter | None = None,
    tracer: Tracer | None = None,
    readiness: Readiness | None = None,
    reuse_port: bool = False,
    tls: Context | None = None,
    limits: DoorLimits | None = None,
) -> AsyncIterator[GrpcFront]:
    """Serves for as long as the block lasts; needs `bridge.open_loop()` around it. `OSError`: it cannot listen there.
    `readiness`: what `grpc.health.v1` tells. `tls`: asked for the context of each new connection; None: cleartext.
    `limits`: those of connections, calls and messages.

    Leaving the block without `GrpcFront.drain` cuts running calls off.
    """
    limits = limits or DoorLimits()
    servicer = Servicer(service, authenticator, drain, meter or Meter(), tracer or Tracer(), limits)
    readiness = readiness or Readiness(service, drain)
    front = await run_aio(_start(servicer, readiness, host, port, reuse_port, tls, limits))
    try:
        yield front
    finally:
        with trio.move_on_after(STOP_SECS, shield=True):
            await front.drain(0.0)


async def _start(
    servicer: Servicer,
    readiness: Readiness,
    host: str,
    port: int,
    reuse_port: bool,
    tls: Context | None,
    limits: DoorLimits,
) -> GrpcFront:
    async def is_ready() -> bool:
        return (await call_trio(readiness.report)).is_ready

    serving = ServiceStatus()
    serving.set(True)
    ready = ServiceCheck(is_ready, check_ttl=HEALTH_KEPT_SECS, check_timeout=HEALTH_CHECK_SECS)
    await ready.__check__()  # without a first answer a watcher would be told NOT_SERVING
    checks = [serving, ready]
    ours, *open_services = ServerReflection.extend([servicer, Health({servicer: checks, OVERALL: checks})])
    server = DrainingServer(
        [ours, *(Guarded(service) for service in open_services)],
        codec=ProtoCodec(),
        status_details_codec=ProtoStatusDetailsCodec(),
        config=WINDOWS,
        tls=tls,
        limits=limits,
    )
    await server.start(host, port, reuse_port=reuse_port)
    return GrpcFront(server, serving)
