"""`saga serve --workers N`: processes that share the ports and one Postgres, started anew, stopped together."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_app import WORKFLOW
from tests.support.participants import participant
from tests.support.postgres import ask
from tests.support.server_process import ServerProcess, free_port, server_process

SECS = 30.0


def until(holds: Callable[[], bool], server: ServerProcess) -> None:
    """Waits for something that only other processes bring about."""
    give_up_at = time.monotonic() + SECS
    while not holds():
        assert time.monotonic() < give_up_at, server.log
        time.sleep(0.01)  # foreign processes: nothing to wait on but what they show


def pids(server: ServerProcess) -> dict[int, int]:
    """The processes of the workers by number, the newest of each."""
    return {int(number): int(pid) for number, pid in re.findall(r"worker_started worker=(\d+) pid=(\d+)", server.log)}


def ready(server: ServerProcess) -> list[int]:
    """The numbers of the workers that said they serve, in the order they said it."""
    return [int(number) for number in re.findall(r"worker-(\d+) saga.server ready", server.log)]


def is_alive(pid: int) -> bool:
    """False also for a zombie: where nobody adopts orphans, their remains stay."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_share_the_ports_and_one_signal_ends_them_all_in_order(
    tmp_path: Path, postgres_dsn: str, number: signal.Signals
) -> None:
    with (
        participant(flavour="grpclib") as shop,
        server_process(
            tmp_path, {"services": {"shop": shop.settings()}}, "--workers", "3", env={"DATABASE_URL": postgres_dsn}
        ) as server,
    ):
        server.spawn()
        until(lambda: len(ready(server)) == 3, server)
        server.register(WORKFLOW.format(name="one"))
        for saga_id in [server.start_saga("one", {}) for _ in range(20)]:
            assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
        served = {row[0] for row in ask(postgres_dsn, "SELECT owner FROM saga.saga_states WHERE owner IS NOT NULL")}
        # Connections are dealt out by a hash of their ports: 20 of them all on one of three is as good as impossible.
        assert len(served) > 1
        server.signal(number)
        assert server.wait() == 0
        assert server.log.count(" stopped") == 3
        assert "Traceback" not in server.log
        assert not any(is_alive(pid) for pid in pids(server).values())
        assert ask(postgres_dsn, "SELECT id FROM saga.workers") == []


def series(server: ServerProcess, name: str) -> dict[str, float]:
    """The values of a metric by their labels, as a scraper reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        ",".join(f"{label}={value}" for label, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def test_whoever_is_scraped_tells_of_all_workers(tmp_path: Path, postgres_dsn: str) -> None:
    with (
        participant(flavour="grpclib") as shop,
        server_process(
            tmp_path, {"services": {"shop": shop.settings()}}, "--workers", "2", env={"DATABASE_URL": postgres_dsn}
        ) as server,
    ):
        server.spawn()
        until(lambda: len(ready(server)) == 2, server)
        server.register(WORKFLOW.format(name="one"))
        for _ in range(20):
            server.start_saga("one", {})
        until(lambda: sum(series(server, "saga_finished_total").values()) == 20, server)
        # Each scrape is a connection of its own, and so reaches one worker or the other; each has told the other soon.
        until(lambda: all(sum(series(server, "saga_started_total").values()) == 20 for _ in range(10)), server)
        for _ in range(10):
            assert series(server, "saga_active").keys() == {"worker=1", "worker=2"}
            # What both read from the store they share is told once.
            assert len(series(server, "saga_open")) == 3


def test_a_worker_that_dies_is_started_again(tmp_path: Path, postgres_dsn: str) -> None:
    with server_process(tmp_path, {}, "--workers", "2", env={"DATABASE_URL": postgres_dsn}) as server:
        server.spawn()
        until(lambda: len(ready(server)) == 2, server)
        before = pids(server)
        os.kill(before[2], signal.SIGKILL)
        until(lambda: sorted(ready(server)) == [1, 2, 2], server)
        after = pids(server)
        assert after[1] == before[1]
        assert after[2] != before[2]
        assert f"worker_died worker=2 pid={before[2]} status=-9" in server.log
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_stop_that_comes_while_workers_are_starting_is_not_lost(tmp_path: Path, postgres_dsn: str) -> None:
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        with server_process(folder, {}, "--workers", "4", env={"DATABASE_URL": postgres_dsn}) as server:
            server.spawn()
            until(lambda: "worker_started worker=" in server.log, server)
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            assert not any(is_alive(pid) for pid in pids(server).values())


def test_a_ctrl_c_that_also_reaches_a_worker_that_is_being_born_ends_all_in_order(
    tmp_path: Path, postgres_dsn: str
) -> None:
    """A terminal signals its whole group, and a worker is in it until it has left."""
    script = (
        "import os, signal, sys; from server.cli import main; leave = os.setpgid;"
        " os.setpgid = lambda pid, group: ("
        " os.kill(os.getppid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT), leave(pid, group));"
        " sys.exit(main(sys.argv[1:]))"
    )
    with server_process(
        tmp_path, {}, "--workers", "2", env={"DATABASE_URL": postgres_dsn}, program=("-c", script)
    ) as server:
        server.spawn()
        assert server.wait() == 0
        assert "worker_crashed" not in server.log


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path, postgres_dsn: str) -> None:
    with server_process(tmp_path, {}, "--workers", "2", env={"DATABASE_URL": postgres_dsn}) as server:
        server.spawn()
        until(lambda: len(ready(server)) == 2, server)
        server.kill()
        until(lambda: not any(is_alive(pid) for pid in pids(server).values()), server)
        # In order: they drained, and left the store as they would have after a SIGTERM.
        assert ask(postgres_dsn, "SELECT id FROM saga.workers") == []


def test_port_0_is_one_free_port_for_all(tmp_path: Path, postgres_dsn: str) -> None:
    config = {"server": {"port": 0, "grpc_port": 0}}
    with server_process(tmp_path, config, "--workers", "2", env={"DATABASE_URL": postgres_dsn}) as server:
        server.spawn()
        until(lambda: len(ready(server)) == 2, server)
        addresses = set(re.findall(r"rest=http://127.0.0.1:(\d+) grpc=127.0.0.1:(\d+)", server.log))
        assert len(addresses) == 1
        assert "0" not in next(iter(addresses))
        server.port = int(next(iter(addresses))[0])
        assert server.call("GET", "/readyz")[0] == 200


def test_the_embedded_store_refuses_several_workers(tmp_path: Path) -> None:
    with server_process(tmp_path, {}, "--workers", "2") as server:
        server.spawn()
        assert server.wait() == 1
        assert "saga: --workers 2: the embedded store belongs to one process" in server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize("key", ["port", "grpc_port"])
def test_a_port_on_which_other_workers_listen_is_named_with_its_key(
    tmp_path: Path, postgres_dsn: str, key: str
) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = {"server": {"port": free_port(), "grpc_port": free_port(), key: taken.getsockname()[1]}}
        with server_process(tmp_path, config, "--workers", "2", env={"DATABASE_URL": postgres_dsn}) as server:
            server.spawn()
            assert server.wait() == 1
            assert f"saga: server.{key}: cannot listen on 127.0.0.1:{taken.getsockname()[1]}" in server.log
            assert "in use (workers whose parent was killed hold it until they have drained)" in server.log
            assert "worker_started" not in server.log


def test_what_a_person_has_to_mend_ends_the_start_instead_of_being_tried_for_ever(
    tmp_path: Path, postgres_dsn: str
) -> None:
    ask(postgres_dsn, "INSERT INTO saga.schema_migrations VALUES (99, 'from_tomorrow', 'x', now())")
    with server_process(tmp_path, {}, "--workers", "2", env={"DATABASE_URL": postgres_dsn}) as server:
        server.spawn()
        assert server.wait() == 1
        assert re.search(r"saga: worker [12]: .*099?", server.log)
        assert "Traceback" not in server.log


def test_a_worker_that_hangs_is_killed_when_its_time_to_stop_is_over(tmp_path: Path, postgres_dsn: str) -> None:
    config = {"saga": {"shutdown_grace_secs": 1}}
    script = (
        "import sys; from server import workers; workers.STOP_SECS = 0.5; from server.cli import main;"
        " sys.exit(main(sys.argv[1:]))"
    )
    with server_process(
        tmp_path, config, "--workers", "2", env={"DATABASE_URL": postgres_dsn}, program=("-c", script)
    ) as server:
        server.spawn()
        until(lambda: len(ready(server)) == 2, server)
        os.kill(pids(server)[1], signal.SIGSTOP)
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
        assert "workers_killed" in server.log
        assert not any(is_alive(pid) for pid in pids(server).values())
