"""Readiness tells the truth: each of its checks is made false for real under a running server, and true again."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import bridge  # noqa: F401  isort: skip  (before grpclib)
import asyncpg
from grpclib.client import Channel
from grpclib.health.v1.health_grpc import HealthStub
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from tests.support.line import line_to
from tests.support.postgres import PostgresServer, ask, in_plain_loop
from tests.support.scrape import scrape
from tests.support.server_process import ServerProcess, free_port, server_process

SECS = 30.0
LEASE_SECS = 1.0


def until(holds: Callable[[], bool], server: ServerProcess) -> None:
    """Waits for something that only another process brings about."""
    give_up_at = time.monotonic() + SECS
    while not holds():
        assert time.monotonic() < give_up_at, server.log
        time.sleep(0.02)  # a process of its own: nothing to wait on but what it tells


def readyz(server: ServerProcess) -> tuple[int, str, dict[str, str]]:
    """Status, health, and the checks that are not ok."""
    status, answer = server.call("GET", "/readyz")
    return status, answer["status"], {name: word for name, word in answer["checks"].items() if word != "ok"}


def serves(server: ServerProcess) -> bool:
    """What gRPC health says."""

    async def ask() -> Any:
        async with Channel("127.0.0.1", server.grpc_port) as channel:
            return await HealthStub(channel).Check(HealthCheckRequest(), timeout=SECS)

    return bool(in_plain_loop(ask).status == HealthCheckResponse.SERVING)


def told_by_metrics(server: ServerProcess) -> set[str]:
    """The checks that `/metrics` tells to be false."""
    return set(re.findall(r'^saga_check_ok{check="(\w+)"} 0\.0$', scrape(server), re.MULTILINE))


def test_each_check_is_false_while_what_it_stands_for_is_not_so(
    tmp_path: Path, postgres_server: PostgresServer, postgres_dsn: str
) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "bad.yaml").write_text("name: bad\nsteps: nonsense\n")
    config = {
        "saga": {"lease_secs": LEASE_SECS, "shutdown_grace_secs": 1},
        "kafka": {"brokers": [f"127.0.0.1:{free_port()}"]},
    }

    def say(sql: str) -> None:
        async def body() -> None:
            connection = await asyncpg.connect(postgres_dsn)
            try:
                await connection.execute(sql)
            finally:
                await connection.close()

        in_plain_loop(body)

    with line_to(postgres_server.port) as line:
        env = {"DATABASE_URL": postgres_dsn.replace(str(postgres_server.port), str(line.port))}
        with server_process(tmp_path, config, env=env) as server:
            server.start()
            # What sagas can do without: a workflow file that does not load, which the log names, and the broker.
            degraded = {"workflows": "rejected", "kafka": "unavailable"}
            until(lambda: readyz(server) == (200, "degraded", degraded), server)
            assert "bad.yaml:2" in server.log
            assert serves(server)
            until(lambda: told_by_metrics(server) == {"workflows", "kafka"}, server)
            assert "\nsaga_ready 1.0" in scrape(server)

            say("INSERT INTO saga.schema_migrations (version, name, checksum) VALUES (999, 'later', 'x')")
            until(lambda: readyz(server) == (200, "degraded", degraded | {"migrations": "newer"}), server)
            say("DELETE FROM saga.schema_migrations WHERE version = 999")
            until(lambda: readyz(server) == (200, "degraded", degraded), server)

            # As it stands while an older release's schema is under this one.
            newest = "SELECT max(version) FROM saga.schema_migrations"
            gone = "DELETE FROM saga.schema_migrations WHERE version = ({}) RETURNING version, name, checksum"
            (migration,) = ask(postgres_dsn, gone.format(newest))
            until(lambda: readyz(server) == (503, "unhealthy", degraded | {"migrations": "older"}), server)
            until(lambda: not serves(server), server)
            until(lambda: "\nsaga_ready 0.0" in scrape(server), server)
            say(f"INSERT INTO saga.schema_migrations (version, name, checksum) VALUES {migration!r}")
            until(lambda: readyz(server) == (200, "degraded", degraded), server)

            line.cut()
            away = {"database": "unavailable", "migrations": "unavailable"}
            until(lambda: readyz(server)[2].items() >= away.items(), server)
            assert readyz(server)[:2] == (503, "unhealthy")
            line.mend()
            until(lambda: readyz(server) == (200, "degraded", degraded), server)
            assert "readiness_changed" in server.log
            assert "Traceback" not in server.log


def test_a_server_whose_named_folder_of_workflows_is_not_there_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def is_answering(server: ServerProcess) -> bool:
        with suppress(OSError):
            return server.call("GET", "/healthz")[0] == 200
        return False

    for mistyped in ("nowhere", "file"):
        with server_process(tmp_path, {"saga": {"data_dir": ":memory:", "workflow_dir": mistyped}}) as server:
            server.spawn()
            until(lambda: is_answering(server), server)
            assert readyz(server) == (503, "unhealthy", {"workflows": "missing"})
            assert f"workflow_dir_missing folder={mistyped} " in server.log


def test_the_default_folder_of_workflows_may_be_missing(tmp_path: Path) -> None:
    with server_process(tmp_path, {"saga": {"data_dir": ":memory:", "workflow_dir": "workflows"}}) as server:
        server.start()
        assert readyz(server) == (200, "healthy", {})
        assert "workflow_dir_missing folder=workflows " in server.log


def test_a_worker_that_cannot_renew_its_lease_is_not_ready_although_its_database_answers(
    tmp_path: Path, postgres_dsn: str
) -> None:
    locked, renewed = threading.Event(), threading.Event()

    async def lock() -> None:
        connection = await asyncpg.connect(postgres_dsn)
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE saga.workers IN ACCESS EXCLUSIVE MODE")
                locked.set()
                await asyncio.to_thread(renewed.wait, SECS)
        finally:
            await connection.close()

    config = {"saga": {"lease_secs": LEASE_SECS, "shutdown_grace_secs": 1}}
    with server_process(tmp_path, config, env={"DATABASE_URL": postgres_dsn}) as server:
        server.start()
        assert readyz(server) == (200, "healthy", {})
        assert serves(server)
        locker = threading.Thread(target=in_plain_loop, args=[lock])
        locker.start()
        try:
            assert locked.wait(SECS)
            until(lambda: readyz(server) == (503, "unhealthy", {"lease": "lost"}), server)
            until(lambda: not serves(server), server)
        finally:
            renewed.set()
            locker.join()
        until(lambda: readyz(server) == (200, "healthy", {}), server)
        until(lambda: serves(server), server)
        assert "\nsaga_worker_leases_lost_total 1.0" in scrape(server)
