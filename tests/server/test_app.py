"""The server as a process: how it starts, what it says when it cannot, how it stops."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from saga.drain import Drain
from saga.errors import Unavailable
from saga.readiness import Readiness, WorkflowsState
from saga.store_outage import StoreOutage
from server.cli import main
from server.workflow_folder import LOOK_SECS, Loaded, keep_looking, load_workflows
from tests.support.participants import participant
from tests.support.postgres import PostgresServer
from tests.support.server_process import ServerProcess, free_port, free_ports, server_process
from tests.support.world import Worker, World, memory_store

WORKFLOW = "name: {name}\nsteps:\n  - {{name: only, service: shop, method: Inventory.Reserve}}\n"
SERVICES = {"shop": {"host": "127.0.0.1", "port": 1}}


def two_free_ports() -> dict[str, Any]:
    return dict(zip(("port", "grpc_port"), free_ports(2), strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_with_0_and_no_traceback(tmp_path: Path, number: signal.Signals) -> None:
    with server_process(tmp_path, {}) as server:
        server.start()
        server.signal(number)
        assert server.wait() == 0
        assert "Traceback" not in server.log
        assert "stopped" in server.log


def test_a_drain_answers_the_long_poll_under_way_and_lets_the_running_attempt_finish(tmp_path: Path) -> None:
    with participant(flavour="grpclib", script={"*": [{"delay_secs": 1.0}]}) as shop:
        with server_process(tmp_path, {"services": {"shop": shop.settings()}}) as server:
            server.start()
            server.register(WORKFLOW.format(name="slow"))
            saga_id = server.start_saga("slow", {})
            answers: list[tuple[int, Any]] = []
            polling = threading.Thread(
                target=lambda: answers.append(server.call("GET", f"/api/v1/sagas/{saga_id}?wait_secs=60"))
            )
            polling.start()
            while not shop.calls():
                pass
            server.signal(signal.SIGTERM)
            polling.join()
            assert server.wait() == 0
            assert answers[0][0] == 200
        with server_process(tmp_path, {"services": {"shop": shop.settings()}}) as server:
            server.start()
            assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
        # The attempt that was running was not cut off and run again.
        assert len(shop.calls()) == 1


def test_a_second_signal_cuts_off(tmp_path: Path) -> None:
    with (
        participant(flavour="grpclib", script={"*": [{"hang": True}]}) as shop,
        server_process(tmp_path, {"services": {"shop": shop.settings()}}) as server,
    ):
        server.start()
        server.register(WORKFLOW.format(name="endless"))
        server.start_saga("endless", {})
        while not shop.calls():
            pass
        server.signal(signal.SIGTERM)
        # Told again until it has had enough: an echo right after the first is not counted. The pause is longer than the
        # interpreter takes to end, when a signal finds nobody to handle it any more.
        while not _ends_within(server, 3.0):
            server.signal(signal.SIGTERM)
        assert server.wait() == 1
        assert "Traceback" not in server.log


def test_the_echo_of_a_signal_cuts_nothing_off(tmp_path: Path) -> None:
    """A shell, make or timeout signals the whole group and then the child once more."""
    with (
        participant(flavour="grpclib", script={"*": [{"delay_secs": 0.5}]}) as shop,
        server_process(tmp_path, {"services": {"shop": shop.settings()}}) as server,
    ):
        server.start()
        server.register(WORKFLOW.format(name="slow"))
        server.start_saga("slow", {})
        while not shop.calls():
            pass
        server.signal(signal.SIGINT)
        while "draining" not in server.log:
            pass
        server.signal(signal.SIGINT)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert shop.calls()[0].ended == "answered"


def _ends_within(server: ServerProcess, secs: float) -> bool:
    try:
        server.wait(secs)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("key", ["port", "grpc_port"])
def test_a_taken_port_is_named_with_its_key(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, server_process(tmp_path, {}) as server:
        server.config.write_text(json.dumps({"server": {**two_free_ports(), key: taken.getsockname()[1]}}))
        server.spawn()
        assert server.wait() == 1
        assert f"saga: server.{key}: cannot listen on 127.0.0.1:{taken.getsockname()[1]}" in server.log
        assert "Traceback" not in server.log


def test_a_bad_configuration_is_refused_with_every_path(tmp_path: Path) -> None:
    with server_process(tmp_path, {"saga": {"max_concurrent": 0, "max_concurent": 1}, "sevices": {}}) as server:
        server.spawn()
        assert server.wait() == 1
        for path in ("saga.max_concurrent", "saga.max_concurent", "sevices"):
            assert path in server.log


def test_without_auth_it_listens_on_loopback_only_unless_insecure(tmp_path: Path) -> None:
    everywhere = {"server": {"host": "0.0.0.0", **two_free_ports()}}
    with server_process(tmp_path, everywhere) as server:
        server.spawn()
        assert server.wait() == 1
        assert "server.host: expected a loopback address" in server.log
    with server_process(tmp_path, everywhere, "--insecure") as server:
        server.port = everywhere["server"]["port"]
        server.start()
        assert "no_access_control" in server.log
        assert status_under_the_name("evil.example", server) == 200
    with server_process(tmp_path, {}) as server:
        server.start()
        assert status_under_the_name("evil.example", server) == 403
        assert status_under_the_name(f"localhost:{server.port}", server) == 200


def status_under_the_name(host: str, server: ServerProcess) -> int:
    return httpx.get(f"http://127.0.0.1:{server.port}/api/v1/sagas", headers={"Host": host}, timeout=20).status_code


def test_with_auth_it_listens_everywhere_and_says_so_when_its_keys_could_be_forged_on_the_way(tmp_path: Path) -> None:
    auth = {"jwks_url": "http://issuer.invalid/jwks", "issuer": "i", "audience": "a"}
    everywhere = {"server": {"host": "0.0.0.0", **two_free_ports()}, "auth": auth}
    with server_process(tmp_path, everywhere) as server:
        server.port = everywhere["server"]["port"]
        server.spawn()
        while " ready rest=" not in server.log:
            assert server.process.poll() is None, server.log
            time.sleep(0.02)  # a process of its own: nothing to wait on but what it tells
        assert server.call("GET", "/readyz")[1]["checks"]["keys"] == "missing"
        assert server.call("GET", "/api/v1/sagas")[0] == 401
        assert "jwks_over_cleartext" in server.log
        assert "no_access_control" not in server.log


def test_a_bad_workflow_file_is_reported_by_name_and_line_and_the_others_load(tmp_path: Path) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "a-good.yaml").write_text(WORKFLOW.format(name="good"))
    (folder / "b-bad.yaml").write_text("name: bad\nsteps:\n  - {name: x, service: shop, method: nonsense}\n")
    (folder / "c-unreadable.yaml").mkdir()
    (folder / "d-again.yml").write_text(WORKFLOW.format(name="good"))
    (folder / "e-other.yml").write_text(WORKFLOW.format(name="other"))
    with server_process(tmp_path, {"services": SERVICES}) as server:
        server.start()
        answer = server.call("GET", "/api/v1/workflows")[1]
        assert [workflow["name"] for workflow in answer["workflows"]] == ["good", "other"]
        assert "b-bad.yaml:3:" in server.log
        assert "steps[0].method" in server.log
        assert "c-unreadable.yaml: cannot be read" in server.log
        assert "d-again.yml: name: workflow good is defined in" in server.log


async def test_workflow_files_wait_for_a_store_that_is_away(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    (tmp_path / "good.yaml").write_text(WORKFLOW.format(name="good").replace("shop", "svc"))
    failures = iter([Unavailable("no answer")] * 3)

    async def away(*args: object) -> None:
        if (error := next(failures, None)) is not None:
            raise error

    world = World()
    async with memory_store(world) as store, Worker(store.port, world).at_work() as worker:
        store.before["register_workflow"] = away
        assert await load_workflows(worker.service, tmp_path) == Loaded(1)
        assert [workflow.definition.name for workflow in await worker.service.workflows()] == ["good"]


async def test_a_named_folder_of_workflows_that_comes_late_is_loaded_then_also_one_that_could_not_be_looked_at(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world, folder = World(), tmp_path / "late"
    async with memory_store(world) as store, Worker(store.port, world).at_work() as worker:
        readiness = Readiness(worker.service, Drain())
        look = partial(keep_looking, worker.service, folder, readiness, StoreOutage(), is_folder_optional=False)
        folder.symlink_to("x" * 300)  # no file system has such a name: whoever looks gets an error
        seen = []
        async with trio.open_nursery() as looks:
            await looks.start(look)
            await trio.sleep(1.5 * LOOK_SECS)
            seen.append(readiness.workflows)
            folder.unlink()
            folder.mkdir()
            (folder / "good.yaml").write_text(WORKFLOW.format(name="good").replace("shop", "svc"))
        assert [*seen, readiness.workflows] == [WorkflowsState.MISSING, WorkflowsState.LOADED]
        assert (await worker.service.workflow("good")).version == 1


async def test_a_file_that_was_superseded_through_the_api_does_not_come_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "trip.yaml"
    first = WORKFLOW.format(name="trip").replace("shop", "svc")
    file.write_text(first)
    world = World()
    async with memory_store(world) as store, Worker(store.port, world).at_work() as worker:
        service = worker.service
        await load_workflows(service, tmp_path)
        await service.register_workflow(first + "timeout_secs: 5\n")
        assert await load_workflows(service, tmp_path) == Loaded(1)
        newest = await service.workflow("trip")
        assert (newest.version, newest.definition.timeout_secs) == (2, 5)
        assert "workflow_superseded" in caplog.text
        # A file that says something new does count, and whoever asks for an old definition gets it.
        file.write_text(first + "timeout_secs: 7\n")
        await load_workflows(service, tmp_path)
        assert (await service.workflow("trip")).version == 3
        assert (await service.register_workflow(first)).workflow.version == 4


def test_definitions_registered_through_the_api_survive_a_restart(tmp_path: Path) -> None:
    with server_process(tmp_path, {"services": SERVICES}) as server:
        server.start()
        server.register(WORKFLOW.format(name="kept"))
        server.kill()
        server.start()
        assert server.call("GET", "/api/v1/workflows/kept")[0] == 200


def test_a_start_with_the_database_down_waits_and_says_so(tmp_path: Path) -> None:
    database = {"host": "127.0.0.1", "port": free_port(), "name": "saga", "user": "postgres", "password": "hidden-word"}
    with server_process(tmp_path, {"database": database}) as server:
        server.spawn()
        while "store_unavailable" not in (server.log if (tmp_path / "server.log").exists() else ""):
            assert server.process.poll() is None
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "hidden-word" not in server.log


def test_a_second_server_on_the_embedded_store_is_refused_with_a_clear_message(tmp_path: Path) -> None:
    with server_process(tmp_path, {}) as first:
        first.start()
        other = tmp_path / "other"
        other.mkdir()
        with server_process(other, {"saga": {"data_dir": str(tmp_path / "data")}}) as second:
            second.spawn()
            assert second.wait() == 1
            assert "another process" in second.log
            assert "Traceback" not in second.log


def test_a_database_that_everybody_on_the_machine_can_read_is_a_warning(tmp_path: Path) -> None:
    with server_process(tmp_path, {}) as server:
        server.start()
        server.kill()
        assert "database_file_readable" not in server.log
        for path, mode in (("data", 0o755), ("data/saga.sqlite3", 0o644)):
            (tmp_path / path).chmod(mode)
        server.start()
        assert "database_file_readable path=data/saga.sqlite3 mode=0644" in server.log


def test_a_data_dir_that_is_a_file_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with server_process(tmp_path, {"saga": {"data_dir": "file"}}) as server:
        server.spawn()
        assert server.wait() == 1
        assert "saga: saga.data_dir: file" in server.log
        assert "Traceback" not in server.log


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "saga.sqlite3").write_text("this is not a database, whatever its name says" * 100)
    with server_process(tmp_path, {}) as server:
        server.spawn()
        assert server.wait() == 1
        assert "saga: data/saga.sqlite3: " in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize("content", [None, b"garbage"])
def test_a_descriptor_set_that_cannot_be_used_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "set.bin").write_bytes(content)
    services = {"shop": {"host": "127.0.0.1", "port": 1, "descriptor_set": "set.bin"}}
    with server_process(tmp_path, {"services": services}) as server:
        server.spawn()
        assert server.wait() == 1
        assert "services.shop.descriptor_set: set.bin: " in server.log


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("saga ")


def test_workflow_check_prints_file_line_column_and_path_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(WORKFLOW.format(name="good"))
    bad.write_text("name: bad\nsteps:\n  - name: x\n    service: shop\n    method: A.B\n    retry: {max_attempts: 0}\n")
    assert main(["workflow", "check", str(good)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["workflow", "check", str(good), str(bad)]) == 1
    assert capsys.readouterr().out.startswith(f"{bad}:6:27: steps[0].retry.max_attempts: expected int >= 1")
    assert main(["workflow", "check", "--json", str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {
            "file": str(bad),
            "line": 6,
            "column": 27,
            "field": "steps[0].retry.max_attempts",
            "reason": "range",
            "message": "expected int >= 1, got 0",
        }
    ]
    assert main(["workflow", "check", "--json", str(good)]) == 0
    assert json.loads(capsys.readouterr().out) == []


def _migrate(config: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[bool]:
    """Runs a migration; which of the migrations are applied then."""
    assert main(["migrate", *arguments, "--config", str(config)]) == 0
    capsys.readouterr()
    assert main(["migrate", "status", "--json", "--config", str(config)]) == 0
    return [row["applied_at"] is not None for row in json.loads(capsys.readouterr().out)]


@pytest.mark.parametrize("kind", ["postgres", "sqlite"])
def test_migrate_goes_up_and_down_and_says_where_it_stands(
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"saga": {"data_dir": str(tmp_path / "data")}}))
    with postgres_server.empty_database() as dsn:
        if kind == "postgres":
            monkeypatch.setenv("DATABASE_URL", dsn)
        assert all(_migrate(config, capsys, "up"))
        assert _migrate(config, capsys, "down", "--yes")[-1] is False
        assert not any(_migrate(config, capsys, "down", "--yes", "--to", "0"))
        assert all(_migrate(config, capsys, "up"))
    assert main(["migrate", "up", "--to", "1", "--config", str(config)]) == 1


def test_migrate_takes_nothing_back_without_a_yes_or_under_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_dsn)
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    assert main(["migrate", "down", "--config", str(config)]) == 1
    assert "--yes" in capsys.readouterr().err
    with server_process(tmp_path, {}, env={"DATABASE_URL": postgres_dsn}) as server:
        server.start()
        assert main(["migrate", "down", "--yes", "--config", str(config)]) == 1
        assert "1 worker(s) run on this database: stop them first" in capsys.readouterr().err
        assert server.call("GET", "/readyz")[0] == 200
    assert all(_migrate(config, capsys, "up"))


def test_migrate_says_that_the_database_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://postgres:hidden-word@127.0.0.1:{free_port()}/saga")
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    assert main(["migrate", "status", "--config", str(config)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("saga: ")
    assert "hidden-word" not in printed
