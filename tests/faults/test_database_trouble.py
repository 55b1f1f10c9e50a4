"""The database goes away, crashes, is full: requests get an honest 503, sagas stall, and all goes on by itself.

Real servers under load, a real Postgres that is stopped, crashed and started again, a real participant.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from k1s0.system.saga.v1.saga_grpc import SagaServiceStub
from k1s0.system.saga.v1.saga_pb2 import StartSagaRequest

from tests.faults.load import Load, load, until
from tests.faults.test_kill import GOOD, by_saga, check_ledger
from tests.support.participants import Participant, participant
from tests.support.postgres import PostgresServer, ask, in_plain_loop
from tests.support.server_process import ServerProcess, server_process

FILL_DISK = """
    CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
    END;
    $$
"""
TABLES = ("saga_states", "saga_step_logs", "outbox", "workers")


@contextmanager
def under_load(folder: Path, env: dict[str, str]) -> Iterator[tuple[ServerProcess, Participant, Load]]:
    """A server whose clients start sagas all the time; at the end each that was answered has ended, and only those are
    there."""
    with participant(flavour="grpcio", script={"*": [{"delay_secs": 0.05, "once": True}]}) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"lease_secs": 3.0}}
        with server_process(folder, config, env=env) as server:
            server.start()
            server.register(GOOD)
            with load([server], ["good"]) as clients:
                clients.until_answered(20)
                yield server, shop, clients
                # Well again: new sagas are taken, and nobody had to do anything about it.
                clients.until_answered(20)
                until(lambda: readiness(server)[0] == 200, server)
            for saga_id in clients.answered:
                assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
            assert not clients.unexpected
            assert server.call("GET", "/api/v1/sagas?page_size=1")[1]["pagination"]["total_count"] == len(
                clients.answered
            )
            assert by_saga(shop.calls()).keys() == clients.answered.keys()
            check_ledger(shop.calls(), dict.fromkeys(clients.answered, "COMPLETED"))


def readiness(server: ServerProcess) -> tuple[int, str]:
    status, answer = server.call("GET", "/readyz")
    return status, answer["checks"]["database"]


def check_refusals(server: ServerProcess, clients: Load) -> None:
    """Everybody is told the truth: clients of both doors, and whoever asks whether the server is ready."""
    until(lambda: clients.refused["SYS_SAGA_UNAVAILABLE"] >= 5, server)
    assert set(clients.refused) == {"SYS_SAGA_UNAVAILABLE"}
    until(lambda: readiness(server)[0] == 503, server)
    assert readiness(server)[1] != "ok"
    assert server.call("GET", "/healthz")[0] == 200  # to be started anew would not help it

    async def start() -> Status:
        async with Channel("127.0.0.1", server.grpc_port) as channel:
            try:
                await SagaServiceStub(channel).StartSaga(StartSagaRequest(workflow_name="good"), timeout=30)
            except GRPCError as error:
                return error.status
        return Status.OK

    assert in_plain_loop(start) is Status.UNAVAILABLE


@pytest.mark.parametrize("end", [PostgresServer.stop, PostgresServer.crash], ids=["restarted", "crashed"])
def test_sagas_stall_while_postgres_is_away_and_go_on_by_themselves(
    tmp_path: Path, breakable: tuple[PostgresServer, str], end: object
) -> None:
    postgres, dsn = breakable
    with under_load(tmp_path, {"DATABASE_URL": dsn}) as (server, _, clients):
        assert callable(end)
        end(postgres)
        check_refusals(server, clients)
        postgres.start()


def test_a_server_that_is_started_before_its_database_begins_by_itself_when_that_is_there(
    tmp_path: Path, breakable: tuple[PostgresServer, str]
) -> None:
    postgres, dsn = breakable
    postgres.stop()
    with server_process(tmp_path, {}, env={"DATABASE_URL": dsn}) as server:
        server.spawn()
        until(lambda: "store_unavailable" in server.log, server)
        assert server.process.poll() is None
        postgres.start()
        server.until_ready()


def test_connections_that_are_cut_again_and_again_lose_nothing(
    tmp_path: Path, breakable: tuple[PostgresServer, str]
) -> None:
    _, dsn = breakable
    with under_load(tmp_path, {"DATABASE_URL": dsn}) as (_, _, clients):
        for _ in range(5):
            ask(
                dsn,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()",
            )
            clients.until_answered(10)
        assert set(clients.refused) <= {"SYS_SAGA_UNAVAILABLE"}


def test_sagas_stall_while_postgres_has_no_room_and_go_on_when_it_has(tmp_path: Path, postgres_dsn: str) -> None:
    with under_load(tmp_path, {"DATABASE_URL": postgres_dsn}) as (server, _, clients):
        ask(postgres_dsn, FILL_DISK)
        for table in TABLES:
            ask(
                postgres_dsn,
                f"CREATE TRIGGER no_room BEFORE INSERT OR UPDATE ON saga.{table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION no_room()",
            )
        check_refusals(server, clients)
        for table in TABLES:
            ask(postgres_dsn, f"DROP TRIGGER no_room ON saga.{table}")


def test_sagas_stall_while_the_disk_of_the_embedded_store_is_full_and_go_on_when_there_is_room(tmp_path: Path) -> None:
    with under_load(tmp_path, {}) as (server, _, clients):
        # No file may grow: SQLite's answer is that of a full disk, and the log's loss is of no account.
        old = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1, old[1]))
        check_refusals(server, clients)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, old)
