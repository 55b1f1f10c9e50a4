"""Serving the application on hypercorn's Trio worker."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import cast

import hypercorn.trio
import trio
from hypercorn.config import Config
from hypercorn.typing import Framework
from quart_trio import QuartTrio

from saga.door_limits import DoorLimits
from web import guarded_h2_protocol, guarded_h11_protocol, guarded_tcp_server
from web.handshakes import GuardedConfig

KEEP_ALIVE_SECS = 75.0
"""How long an idle connection stays open; as nginx does, so that a proxy in front closes first."""
BACKLOG = 1024


async def serve_rest(
    app: QuartTrio,
    host: str,
    port: int,
    *,
    shutdown_trigger: Callable[[], Awaitable[None]],
    grace_secs: float | Callable[[], float] = 30.0,
    reuse_port: bool = False,
    max_connections: int = DoorLimits().max_connections,
    tls: Callable[[], ssl.SSLContext] | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until `shutdown_trigger` returns and running requests have ended, or had `grace_secs` (asked for then, if
    it is a function).

    Started with the port it listens on (`port` 0: a free one). `OSError`: it cannot listen there. `reuse_port`: other
    processes may listen on the same one. `max_connections`: open at a time (`saga.door_limits.Places`). `tls`: asked
    for the context of each new connection; None: cleartext.
    """
    guarded_tcp_server.install()
    guarded_h11_protocol.install()
    guarded_h2_protocol.install()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=reuse_port)
    bound = int(listener.getsockname()[1])
    config = GuardedConfig(max_connections)
    config.tls = tls
    config.bind = [f"fd://{listener.detach()}"]
    config.backlog = BACKLOG

    async def shutdown() -> None:
        await shutdown_trigger()
        config.handshakes.cut()
        config.graceful_timeout = grace_secs() if callable(grace_secs) else grace_secs  # read after this returns

    config.keep_alive_timeout = KEEP_ALIVE_SECS
    config.keep_alive_max_requests = 1_000_000
    config.include_server_header = False
    config.accesslog = None  # the Door writes that line, with the request's id
    config.errorlog = logging.getLogger("saga.web.hypercorn")
    config.errorlog.setLevel(logging.WARNING)  # its start-up line names a file descriptor, not an address
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve, cast(Framework, app), config, shutdown)
        task_status.started(bound)


async def _serve(
    app: Framework,
    config: Config,
    shutdown_trigger: Callable[[], Awaitable[None]],
    task_status: trio.TaskStatus[list[str]],
) -> None:
    await hypercorn.trio.serve(app, config, shutdown_trigger=shutdown_trigger, task_status=task_status)
