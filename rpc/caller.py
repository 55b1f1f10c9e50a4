"""`saga.ports.StepCaller` over gRPC: one attempt, from the JSON object of a step to an `Answer`.

The steps of an attempt: find the participant, find its method (cached), write the request, make the call
(`channels.py`), judge what came back (`outcomes.py`). Whatever goes wrong in any of them is an `Answer`; the one thing
that passes through is a cancel from outside, and it resets the stream on its way.
"""

from __future__ import annotations

import base64
import binascii
import logging
import math
from collections.abc import Mapping
from urllib.parse import unquote

import msgspec
import trio
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status as RichStatus
from grpclib.const import Status
from grpclib.metadata import USER_AGENT

from rpc.channels import CallInFlight, PoolLimits, ServiceChannel
from rpc.codec import JsonCodec, MessageCodec, ProtobufCodec
from rpc.exchange import Header, Reply
from rpc.metadata import metadata_of
from rpc.outcomes import OUTCOME_OF_STATUS, STATUS_OF_HTTP, Lost, clean_text, in_doubt, not_done
from rpc.reflection import Catalog, catalog_by_reflection, catalog_from_descriptor_set
from rpc.settings import ServiceSettings
from rpc.single_flight import RunCancelled, SingleFlight
from saga.ports import Answer, Outcome, StepCall

__all__ = ["GrpcStepCaller", "ServiceSettings"]

log = logging.getLogger("saga.rpc")

MAX_RETRY_AFTER_SECS = 86_400.0
"""The longest pause a participant can ask for. One day: what is meant to wait longer is not a retry."""


class GrpcStepCaller:
    """Calls participants by gRPC. Needs an open asyncio loop (`bridge.open_loop`) when called; the constructor does no
    I/O, so participants may be down at start and come and go.

    `services` maps the names workflows use to where they are. `max_payload_bytes` bounds requests and answers alike.
    """

    def __init__(
        self,
        services: Mapping[str, ServiceSettings],
        *,
        max_payload_bytes: int = 1_048_576,
        limits: PoolLimits | None = None,
    ) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._participants = {
            name: _Participant(settings, limits or PoolLimits()) for name, settings in services.items()
        }

    async def call(self, call: StepCall) -> Answer:
        """Makes the attempt and says what came of it; never raises for anything a participant or the network does.
        Cancelled: the call in flight is reset before this returns."""
        progress = CallInFlight()
        if not call.timeout_secs > 0:
            return _out_of_time(call, progress)
        deadline = trio.current_time() + call.timeout_secs
        try:
            with trio.CancelScope(deadline=deadline):
                return await self._attempt(call, deadline, progress)
            return _out_of_time(call, progress)
        except Lost as lost:
            return Answer(
                outcome=lost.outcome, code=lost.code, message=clean_text(lost.message), permanent=lost.permanent
            )
        except Exception as error:  # a bug of ours, or of a library on hostile bytes: this step's trouble only
            log.exception("participant_call_broke saga_id=%s step=%s", call.saga_id, call.step_name)
            outcome = Outcome.UNKNOWN if progress.left else Outcome.NOT_DONE
            return Answer(outcome=outcome, code="INTERNAL", message=clean_text(f"{type(error).__name__}: {error}"))

    async def _attempt(self, call: StepCall, deadline: float, progress: CallInFlight) -> Answer:
        participant = self._participants.get(call.service)
        if participant is None:
            known = ", ".join(sorted(self._participants)) or "none"
            raise not_done(
                "UNIMPLEMENTED", f"no service {call.service!r} is configured; known: {known}", permanent=True
            )
        route = participant.routes.get(call.method) or await participant.find_route(call.method)
        request = route.codec.encode(call.request, strict=call.strict)
        if len(request) > self._max_payload_bytes:
            raise not_done(
                "RESOURCE_EXHAUSTED",
                f"the request has {len(request)} bytes, the limit is {self._max_payload_bytes}",
                permanent=True,
            )
        reply = await participant.channel.unary(
            route.headers,
            metadata_of(call),
            request,
            deadline=deadline,
            answer_limit=self._max_payload_bytes,
            progress=progress,
        )
        status, message = status_of(reply)
        if status is Status.OK:
            if reply.body is None:
                raise in_doubt("INTERNAL", "the participant said OK without an answer", permanent=True)
            return Answer(outcome=Outcome.DONE, response=route.codec.decode(reply.body))
        if status is Status.UNIMPLEMENTED:
            participant.doubt_catalog()
        return Answer(
            outcome=OUTCOME_OF_STATUS[status],
            code=status.name,
            message=clean_text(message) or status.name,
            retry_after_secs=retry_after_of(reply),
        )

    def connections(self, service: str) -> int:
        """How many connections to this service are open now."""
        return self._participants[service].channel.connections

    async def aclose(self) -> None:
        """Closes every connection; calls in flight end as unknown, later ones as not done."""
        for participant in self._participants.values():
            await participant.aclose()


def _out_of_time(call: StepCall, progress: CallInFlight) -> Answer:
    if progress.left and progress.link is not None:
        progress.link.suspect_if_silent(progress.sent_at)
        message = f"no answer within {call.timeout_secs:g} s"
        return Answer(outcome=Outcome.UNKNOWN, code="DEADLINE_EXCEEDED", message=message)
    message = f"the call could not be sent within {call.timeout_secs:g} s"
    return Answer(outcome=Outcome.NOT_DONE, code="DEADLINE_EXCEEDED", message=message)


# --- reading an answer -----------------------------------------------------------------------------------------------


def status_of(reply: Reply) -> tuple[Status, str]:
    """The status and its text. An answer without a gRPC status, or with one nobody defined, is `UNKNOWN` or what its
    HTTP status stands for."""
    fields = reply.trailers if "grpc-status" in reply.trailers else reply.headers
    number = fields.get("grpc-status")
    if number is not None:
        try:
            return Status(int(number)), unquote(fields.get("grpc-message", ""), errors="replace")
        except ValueError:
            return Status.UNKNOWN, f"the participant answered with the undefined status {number!r}"
    http = reply.headers.get(":status", "none")
    if http != "200":
        return STATUS_OF_HTTP.get(http, Status.UNKNOWN), f"the participant answered with HTTP status {http}"
    return Status.UNKNOWN, "the participant ended its answer without a status"


def retry_after_of(reply: Reply) -> float | None:
    """The pause asked for by `google.rpc.RetryInfo` in the error details, in seconds, at most `MAX_RETRY_AFTER_SECS`;
    None: none was asked for, or not in a form that can be read."""
    encoded = reply.trailers.get("grpc-status-details-bin") or reply.headers.get("grpc-status-details-bin")
    if not encoded:
        return None
    try:
        details = RichStatus.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4))).details
        for detail in details:
            if detail.Is(RetryInfo.DESCRIPTOR):
                info = RetryInfo()
                detail.Unpack(info)
                delay = info.retry_delay.seconds + info.retry_delay.nanos / 1e9
                return min(delay, MAX_RETRY_AFTER_SECS) if delay >= 0 and math.isfinite(delay) else None
    except (binascii.Error, DecodeError, ValueError):
        return None
    return None


# --- one participant -------------------------------------------------------------------------------------------------


class _Route(msgspec.Struct, frozen=True):
    """How one method is called: the headers every call of it begins with, and how its messages are written."""

    headers: list[Header]
    codec: MessageCodec


class _Participant:
    """One service of the configuration: its connections and what is known of its methods."""

    def __init__(self, settings: ServiceSettings, limits: PoolLimits) -> None:
        self._settings = settings
        self.channel = ServiceChannel(settings, limits, on_disconnect=self.doubt_catalog)
        self.routes: dict[str, _Route] = {}
        self._catalog: Catalog | None = None
        self._catalog_doubted = False
        self._lookup: SingleFlight[Catalog] = SingleFlight(self._reflect)

    def doubt_catalog(self) -> None:
        """What is known of the methods may be out of date: it is read again before the next call."""
        if self._settings.codec == "protobuf" and self._settings.descriptor_set is None:
            self._catalog_doubted = True
            self.routes.clear()

    async def find_route(self, method: str) -> _Route:
        """The route of `Service.Method`, remembered. Raises `Lost`."""
        settings = self._settings
        if settings.codec == "json" and settings.descriptor_set is None:
            # Nothing says what services there are, so the name is taken as it is written.
            service, _, name = method.rpartition(".")
            route = _Route(self._headers(f"/{service}/{name}"), JsonCodec())
        else:
            catalog, fresh = await self._known_catalog()
            try:
                found = catalog.method(method)
            except Lost:
                if fresh or settings.descriptor_set is not None:
                    raise
                catalog = await self._read_catalog()
                found = catalog.method(method)
            path = f"/{found.containing_service.full_name}/{found.name}"
            codec = JsonCodec() if settings.codec == "json" else ProtobufCodec(found, catalog.pool)
            route = _Route(self._headers(path), codec)
        self.routes[method] = route
        return route

    def _headers(self, path: str) -> list[Header]:
        # grpcio takes any subtype of application/grpc; a grpclib server with a JSON codec takes "+json" alone.
        content_type = "application/grpc+json" if self._settings.codec == "json" else "application/grpc"
        return [
            (":method", "POST"),
            (":scheme", self.channel.scheme),
            (":path", path),
            (":authority", self.channel.authority),
            ("te", "trailers"),
            ("content-type", content_type),
            ("user-agent", USER_AGENT),
        ]

    async def _known_catalog(self) -> tuple[Catalog, bool]:
        """The catalog, and whether it was read just now."""
        if self._catalog is None:
            return await self._read_catalog(), True
        if self._catalog_doubted:
            try:
                return await self._read_catalog(), True
            except Lost as lost:
                # A participant that cannot describe itself now may still be called as it was.
                log.info("participant_catalog_kept authority=%s reason=%s", self.channel.authority, lost.message)
        return self._catalog, False

    async def _read_catalog(self) -> Catalog:
        path = self._settings.descriptor_set
        if path is not None:
            try:
                catalog = catalog_from_descriptor_set(await trio.Path(path).read_bytes())
            except (OSError, ValueError) as error:
                raise not_done("UNAVAILABLE", f"descriptor_set {path}: {error}") from error
        else:
            try:
                catalog = await self._lookup.result()
            except RunCancelled:
                raise not_done("UNAVAILABLE", "this worker is shutting down") from None
        if self._catalog is None or self._catalog.files != catalog.files:
            self._catalog = catalog
            self.routes.clear()
        self._catalog_doubted = False
        return self._catalog

    async def _reflect(self) -> Catalog:
        settings = self._settings
        return await catalog_by_reflection(
            settings.host,
            settings.port,
            tls=self.channel.tls_context(),
            server_name=settings.tls.server_name if settings.tls else None,
        )

    async def aclose(self) -> None:
        self._lookup.cancel()
        await self.channel.aclose()
