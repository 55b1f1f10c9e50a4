"""Both doors of one orchestrator in this process, with or without TLS, and raw connections to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import trio
from grpclib.client import Channel
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from bridge import open_loop, run_aio
from rpc.server import serve_grpc
from saga.authentication import OpenAccess
from saga.door_limits import DoorLimits
from saga.meter import Meter
from server.config import ServerTls
from server.tls import ServerContexts
from tests.support.certificates import Certificate, certificate, client_context
from tests.support.orchestrator import House, orchestrator
from web.app import create_app
from web.metrics import PrometheusMeter
from web.serving import serve_rest

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Doors:
    """Where they listen. `made`: the certificate they show; None: they speak no TLS."""

    def __init__(self, house: House, rest_port: int, grpc_port: int, made: Certificate | None) -> None:
        self.house = house
        self.rest_port = rest_port
        self.grpc_port = grpc_port
        self.made = made
        self._trusting = None if made is None else client_context(made.ca_file)
        self._trusting_http2 = None if made is None else client_context(made.ca_file, "h2")

    async def connect(self, port: int, protocol: str) -> Stream:
        """A connection on which `protocol` can be spoken, its handshake done."""
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        if self.made is None:
            return stream
        context = client_context(self.made.ca_file, protocol)
        encrypted = trio.SSLStream(stream, context, server_hostname="localhost", https_compatible=True)
        try:
            await encrypted.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return encrypted

    async def check(self) -> None:
        """Asks both doors something on new connections."""
        with trio.fail_after(20):
            scheme = "https" if self.made else "http"
            async with httpx.AsyncClient(verify=self._trusting or False, timeout=20) as client:
                answer = await client.get(f"{scheme}://localhost:{self.rest_port}/api/v1/workflows")
                assert answer.status_code == 200, answer.text
            health = await run_aio(self._health())
            assert health.status == HealthCheckResponse.SERVING

    async def _health(self) -> HealthCheckResponse:
        async with Channel("localhost", self.grpc_port, ssl=self._trusting_http2) as channel:
            return await HealthStub(channel).Check(HealthCheckRequest(), timeout=20)


@asynccontextmanager
async def open_doors(folder: Path, *, tls: bool = False, limits: DoorLimits | None = None) -> AsyncIterator[Doors]:
    limits = limits or DoorLimits()
    meter = PrometheusMeter()
    made = certificate(folder, called="doors") if tls else None
    contexts = None if made is None else ServerContexts(ServerTls(cert_file=made.cert_file, key_file=made.key_file))
    async with open_loop(), orchestrator(meter) as house, trio.open_nursery() as nursery:
        app = create_app(
            house.service,
            authenticator=OpenAccess(),
            drain=house.drain,
            version="1",
            meter=meter,
            limits=limits,
        )
        stop = trio.Event()
        rest_port = await nursery.start(
            partial(
                serve_rest,
                app,
                "127.0.0.1",
                0,
                shutdown_trigger=stop.wait,
                grace_secs=60.0,
                max_connections=limits.max_connections,
                tls=None if contexts is None else contexts.rest,
            )
        )
        async with serve_grpc(
            house.service,
            "127.0.0.1",
            0,
            authenticator=OpenAccess(),
            drain=house.drain,
            meter=Meter(),
            limits=limits,
            tls=None if contexts is None else contexts.grpc,
        ) as front:
            yield Doors(house, rest_port, front.port, made)
            with trio.fail_after(20):
                await front.drain(1.0)
        # Whoever has left must not be waited for.
        stop.set()
        with trio.fail_after(20):
            while nursery.child_tasks:
                await trio.lowlevel.checkpoint()
