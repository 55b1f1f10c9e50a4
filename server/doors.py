"""Both ports of a server: opened, and closed when a drain is over."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import trio

from rpc.server import serve_grpc
from saga.drain import Drain
from server.config import Config
from server.errors import CannotStart
from server.parts import CLOSE_SECS, Parts
from server.seat import Seat
from web.serving import serve_rest

log = logging.getLogger("saga.server")


async def serve_doors(parts: Parts, config: Config, drain: Drain, seat: Seat | None) -> None:
    """Serves REST and gRPC until a drain is over: the sagas are ended or freed, and the doors have answered what was
    under way. Raises `CannotStart` when an address cannot be had."""
    host, grace_secs = config.server.host, config.saga.shutdown_grace_secs
    contexts, shares_ports = parts.contexts, seat is not None
    sagas_left = trio.Event()
    ends_at = float("inf")
    rest = partial(
        serve_rest,
        parts.rest,
        host,
        config.server.port,
        # Whoever asks during a drain is told so, by /readyz above all; the door closes when the sagas have ended.
        shutdown_trigger=sagas_left.wait,
        grace_secs=lambda: max(CLOSE_SECS, ends_at - trio.current_time()),
        reuse_port=shares_ports,
        max_connections=parts.limits.max_connections,
        tls=None if contexts is None else contexts.rest,
    )
    async with trio.open_nursery() as doors:
        with _named("server.port", host, config.server.port):
            rest_port = await doors.start(rest)
        with _named("server.grpc_port", host, config.server.grpc_port):
            grpc = await doors.start(_serve_grpc, parts, config, drain, shares_ports)
        scheme = "http" if contexts is None else "https"
        log.info("ready rest=%s://%s:%d grpc=%s:%d tls=%s", scheme, host, rest_port, host, grpc, contexts is not None)
        if seat is not None:
            seat.ready()
        await drain.wait()
        log.info("draining sagas=%d", parts.supervisor.active)
        ends_at = trio.current_time() + grace_secs
        await parts.supervisor.drain()
        sagas_left.set()


async def _serve_grpc(
    parts: Parts, config: Config, drain: Drain, shares_ports: bool, task_status: trio.TaskStatus[int]
) -> None:
    async with serve_grpc(
        parts.service,
        config.server.host,
        config.server.grpc_port,
        authenticator=parts.authenticator,
        drain=drain,
        meter=parts.meter,
        tracer=parts.tracer,
        readiness=parts.readiness,
        reuse_port=shares_ports,
        tls=None if parts.contexts is None else parts.contexts.grpc,
        limits=parts.limits,
    ) as front:
        task_status.started(front.port)
        await drain.wait()
        await front.drain(config.saga.shutdown_grace_secs)


@contextmanager
def _named(key: str, host: str, port: int) -> Iterator[None]:
    """An address that cannot be had is a fault of the configuration, and says of which key."""
    try:
        yield
    except OSError as error:
        # asyncio's text repeats the address; the number says it in the system's own words.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CannotStart(f"{key}: cannot listen on {host}:{port}: {reason}") from error
