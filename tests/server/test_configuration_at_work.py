"""What keys of the configuration do to a running server, seen from outside."""

from __future__ import annotations

import signal
import socket
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.participants import participant
from tests.support.server_process import ServerProcess, server_process

ONE_STEP = """\
name: one
steps:
  - name: reserve
    service: shop
    method: Inventory.Reserve
    retry: {max_attempts: 2, initial_interval_ms: 60000}
"""


def sagas_in_memory(server: ServerProcess) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("saga_active "):
                return int(float(line.split()[1]))
    raise AssertionError("no saga_active in /metrics")


def test_max_concurrent_bounds_the_sagas_that_run_and_the_oldest_go_first(tmp_path: Path) -> None:
    with participant(flavour="grpclib", script={"*": [{"delay_secs": 0.2, "once": True}]}) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"max_concurrent": 1}}
        with server_process(tmp_path, config) as server:
            server.start()
            server.register(ONE_STEP)
            saga_ids = [server.start_saga("one", {}) for _ in range(4)]
            assert sagas_in_memory(server) <= 1
            for saga_id in saga_ids:
                assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
            assert [call.metadata["saga-id"] for call in shop.calls()] == saga_ids


@pytest.mark.parametrize(("park_after_secs", "in_memory"), [(30, 0), (90, 1)])
def test_a_retry_that_waits_longer_than_park_after_secs_leaves_memory(
    tmp_path: Path, park_after_secs: int, in_memory: int
) -> None:
    with participant(flavour="grpclib", script={"*": [{"status": "ABORTED"}]}) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"park_after_secs": park_after_secs}}
        with server_process(tmp_path, config) as server:
            server.start()
            server.register(ONE_STEP)
            saga_id = server.start_saga("one", {})
            saga: dict[str, Any] = {"next_attempt_at": None}
            while saga["next_attempt_at"] is None:
                saga = server.call("GET", f"/api/v1/sagas/{saga_id}")[1]["saga"]
            assert (saga["status"], saga["attempt"]) == ("RUNNING", 2)
            give_up_at = time.monotonic() + 10
            while sagas_in_memory(server) != in_memory:  # it has been stored, and is about to leave
                assert time.monotonic() < give_up_at


def test_the_limits_of_the_configuration_hold_on_both_ports(tmp_path: Path) -> None:
    env = {"SAGA__SERVER__LIMITS__MAX_CONNECTIONS": "7", "SAGA__SERVER__LIMITS__MAX_REQUESTS": "1"}
    with server_process(tmp_path, {}, env=env) as server:
        server.start()
        with ExitStack() as stack:
            for port in (server.port, server.grpc_port):
                opened = [
                    stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(8)
                ]
                while opened[0].recv(4096):  # it gave its place to the eighth
                    pass
            under_way = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            under_way.sendall(b"POST /api/v1/sagas HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            give_up_at = time.monotonic() + 20
            while (status := server.call("GET", "/api/v1/workflows")[0]) != 503:
                assert status == 200
                assert time.monotonic() < give_up_at


def test_max_payload_bytes_bounds_payloads_and_answers(tmp_path: Path) -> None:
    script = {"*": [{"answer": {"note": "x" * 300}}]}
    with participant(flavour="grpclib", script=script) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"max_payload_bytes": 200}}
        with server_process(tmp_path, config) as server:
            server.start()
            server.register(ONE_STEP)
            body = {"workflow_name": "one", "payload": {"note": "x" * 200}}
            status, answer = server.call("POST", "/api/v1/sagas", body)
            assert (status, answer["error"]["code"]) == (413, "SYS_SAGA_PAYLOAD_TOO_LARGE")
            ended = server.ended(server.start_saga("one", {"note": "x" * 100}))["saga"]
            assert ended["status"] == "FAILED"
            assert "200" in ended["error_message"]
            assert len(shop.calls()) == 1  # asking again cannot make the answer smaller


def test_shutdown_grace_secs_bounds_the_wait_for_running_attempts(tmp_path: Path) -> None:
    with participant(flavour="grpclib", script={"*": [{"hang": True}]}) as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"shutdown_grace_secs": 0}}
        with server_process(tmp_path, config) as server:
            server.start()
            server.register(ONE_STEP)
            server.start_saga("one", {})
            while not shop.calls():
                pass
            began = time.monotonic()
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            assert time.monotonic() - began < 10  # the default would be 30
            assert "Traceback" not in server.log


def test_codec_json_and_descriptor_set_say_how_a_participant_is_spoken_to(tmp_path: Path) -> None:
    with (
        participant(flavour="grpclib", codec="json", reflection=False) as plain,
        participant(flavour="grpcio", reflection=False) as described,
    ):
        services = {
            "plain": plain.settings(),
            "described": {**described.settings(), "descriptor_set": str(described.descriptor_set)},
            "bare": described.settings(),
        }
        with server_process(tmp_path, {"services": services}) as server:
            server.start()
            for service, method in (
                ("plain", "shop.v1.Inventory.Reserve"),
                ("described", "Inventory.Reserve"),
                ("bare", "Inventory.Reserve"),
            ):
                server.register(f"name: {service}\nsteps:\n  - {{name: a, service: {service}, method: {method}}}\n")
            ended = {name: server.ended(server.start_saga(name, {"order_id": "o-1"}))["saga"] for name in services}
            assert ended["plain"]["status"] == ended["described"]["status"] == "COMPLETED"
            assert plain.calls()[0].request == {"order_id": "o-1"}
            assert described.calls()[0].request == {"orderId": "o-1"}
            assert ended["bare"]["status"] == "FAILED"
            assert "reflection" in ended["bare"]["error_message"]


def test_redact_names_what_neither_pages_nor_lines_show_and_the_api_does(tmp_path: Path) -> None:
    refusal = {"status": "FAILED_PRECONDITION", "message": 'no such account: {"iban": "DE-4711"}'}
    with participant(flavour="grpclib", script={"*": [refusal]}) as shop:
        config = {
            "services": {"shop": shop.settings()},
            "observability": {"redact": ["iban"], "log": {"level": "debug"}},
        }
        with server_process(tmp_path, config) as server:
            server.start()
            server.register(ONE_STEP)
            saga_id = server.start_saga("one", {"order_id": "o-1", "to": [{"iban": "DE-4712"}]})
            ended = server.ended(saga_id)["saga"]
            assert "DE-4711" in ended["error_message"]
            assert ended["payload"]["to"] == [{"iban": "DE-4712"}]
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/sagas/{saga_id}", timeout=10) as answer:
                page = answer.read().decode()
            assert "iban" in page
            assert "no such account" in server.log
            assert "DE-471" not in page + server.log


def test_audit_retention_days_lets_old_entries_of_the_audit_log_go(tmp_path: Path) -> None:
    with participant(flavour="grpclib") as shop:
        services = {"shop": shop.settings()}
        with server_process(tmp_path, {"services": services}) as server:
            server.start()
            server.register(ONE_STEP)
            assert [entry["action"] for entry in audited(server)] == ["REGISTER_WORKFLOW"]
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
        # Removed by the sweep at its start: a millionth of a day is long over.
        with server_process(tmp_path, {"services": services, "saga": {"audit_retention_days": 0.000001}}) as server:
            server.start()
            give_up_at = time.monotonic() + 20
            while audited(server):
                assert time.monotonic() < give_up_at


def audited(server: ServerProcess) -> list[dict[str, Any]]:
    status, answer = server.call("GET", "/api/v1/audit?principal=anonymous")
    assert status == 200
    found: list[dict[str, Any]] = answer["entries"]
    return found
