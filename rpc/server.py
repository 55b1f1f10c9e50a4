"""The gRPC door: what every call passes, and how the door opens and closes. What each method does is `methods.py`.

grpclib runs the methods of `Servicer` on asyncio; each crosses to Trio once a call (a watch: once a message). What an
error becomes is `server_errors.py`, stopping is `draining.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

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
from k1s0.system.saga.v1 import saga_pb2 as pb
from k1s0.system.saga.v1.saga_grpc import SagaServiceBase

from bridge import call_trio, run_aio
from rpc.draining import WINDOWS, DrainingServer
from rpc.handshakes import Context
from rpc.inbound import receive
from rpc.methods import Caller, Methods
from rpc.open_services import Guarded
from rpc.outbound import client_of, send
from rpc.server_errors import failure
from saga.access import Permission, Principal, require, single_authorization
from saga.audit import AuditAction
from saga.authentication import Authenticator
from saga.door_limits import BodyRoom, DoorLimits
from saga.drain import Drain
from saga.errors import PermissionDenied, Unavailable
from saga.log_fields import about
from saga.meter import Meter
from saga.readiness import Readiness
from saga.request_id import request_id
from saga.request_span import RequestSpan
from saga.service import SagaService
from saga.tracing import Attribute, Tracer, read_traceparent, single_traceparent
from saga.workflow_yaml import MAX_YAML_BYTES

log = logging.getLogger("saga.rpc.server")

MESSAGE_SLACK_BYTES = 64 * 1024
"""What a request may have beside its payload or its workflow."""
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
"""What each method asks of its caller. What is open is another service, of those that
`open_services.py` lists."""

AUDITED: Mapping[str, AuditAction] = {
    "StartSaga": AuditAction.START_SAGA,
    "CancelSaga": AuditAction.CANCEL_SAGA,
    "RetryCompensation": AuditAction.RETRY_COMPENSATION,
    "RegisterWorkflow": AuditAction.REGISTER_WORKFLOW,
}
"""What the audit log calls the methods that change something."""

M = TypeVar("M", bound=Message)


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
        self._methods = Methods(service, drain)
        self._authenticator = authenticator
        self._tracer = tracer
        self._meter = meter
        self._max_bytes = max(service.max_payload_bytes, MAX_YAML_BYTES) + MESSAGE_SLACK_BYTES

    async def StartSaga(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "StartSaga", pb.StartSagaRequest, self._methods.start_saga)

    async def GetSaga(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "GetSaga", pb.GetSagaRequest, self._methods.get_saga)

    async def ListSagas(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "ListSagas", pb.ListSagasRequest, self._methods.list_sagas)

    async def CancelSaga(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "CancelSaga", pb.CancelSagaRequest, self._methods.cancel_saga)

    async def RetryCompensation(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "RetryCompensation", pb.RetryCompensationRequest, self._methods.retry_compensation)

    async def RegisterWorkflow(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "RegisterWorkflow", pb.RegisterWorkflowRequest, self._methods.register_workflow)

    async def ListWorkflows(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "ListWorkflows", pb.ListWorkflowsRequest, self._methods.list_workflows)

    async def GetWorkflow(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "GetWorkflow", pb.GetWorkflowRequest, self._methods.get_workflow)

    async def ListAudit(self, stream: Stream[Any, Any]) -> None:
        await self._unary(stream, "ListAudit", pb.ListAuditRequest, self._methods.list_audit)

    async def WatchSaga(self, stream: Stream[Any, Any]) -> None:
        async def states(caller: Caller) -> None:
            request = await receive(stream, pb.WatchSagaRequest, self._max_bytes, self._bodies)
            with self._service.watch(request.saga_id) as watch:
                while (state := await call_trio(self._methods.next_state, watch, caller.principal)) is not None:
                    _leave_if_cancelled()
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
            _leave_if_cancelled()
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
            idempotency_keys=_all(stream.metadata, "idempotency-key"),
            traceparent=traceparent,
            tracestate=tracestate,
            span=RequestSpan(self._tracer, traceparent, tracestate) if self._tracer.enabled else None,
            address=client_of(stream),
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
            _leave_if_cancelled()
            status = Status.OK
        except StreamTerminatedError:
            _leave_if_cancelled()
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
            _leave_if_cancelled()
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


def _leave_if_cancelled() -> None:
    """Raises `CancelledError` if the client has gone, or its deadline has passed, while what it asked for came to its
    end all the same: grpclib logs it as an error of ours if anything else comes of a cancelled call."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


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
