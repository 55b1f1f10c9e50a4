"""`saga serve` with a `kafka` section, as a process: what consumers get of real sagas."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.kafka.conftest import AnyBroker
from tests.support.kafka import MockBroker, Received, first_of_each, reader
from tests.support.line import line_to
from tests.support.participants import participant
from tests.support.server_process import ServerProcess, free_port, server_process

ORDER = """\
name: order
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release,
     compensate_retry: {max_attempts: 1}}
  - {name: charge, service: shop, method: Payments.Charge, compensate: Payments.Refund, retry: {max_attempts: 1}}
"""
DECLINES = [{"status": "FAILED_PRECONDITION", "message": "no"}]


def types_by_saga(received: list[Received]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for one in first_of_each(received):
        found[one.key].append(one.event_type)
    return found


def kafka(broker: AnyBroker, topic: str) -> dict[str, Any]:
    return {"brokers": [broker.bootstrap], "topics": {"publish": topic}}


def metric(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        (line,) = (line for line in answer.read().decode().splitlines() if line.startswith(f"{name} "))
    return float(line.split()[1])


def test_consumers_are_told_of_a_saga_from_its_start_to_its_end(tmp_path: Path, broker: AnyBroker) -> None:
    topic = broker.topic()
    with participant(flavour="grpclib", script={}) as shop:
        config = {"services": {"shop": shop.settings()}, "kafka": kafka(broker, topic)}
        with server_process(tmp_path, config) as server, reader(broker, topic) as read:
            server.start()
            server.register(ORDER)
            saga_id = server.start_saga("order", {"order": 7})
            received = read.until(3)
            assert types_by_saga(received) == {saga_id: ["SAGA_STARTED", "SAGA_RUNNING", "SAGA_COMPLETED"]}
            assert [one.value["payload"] for one in received] == [{"order": 7}] * 3
            assert [one.value["current_step"] for one in received] == [0, 0, 2]
            status, ready = server.call("GET", "/readyz")
            assert (status, ready["status"], ready["checks"]["kafka"]) == (200, "healthy", "ok")
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            assert "Traceback" not in server.log
            assert "stray_error" not in server.log


def test_a_failed_compensation_is_announced_to_the_dead_letters_too(tmp_path: Path, broker: AnyBroker) -> None:
    topic = broker.topic()
    with participant(flavour="grpclib", script={"Charge": DECLINES, "Release": DECLINES}) as shop:
        config = {"services": {"shop": shop.settings()}, "kafka": kafka(broker, topic)}
        with server_process(tmp_path, config) as server, reader(broker, topic, f"{topic}.dlq") as read:
            server.start()
            server.register(ORDER)
            saga_id = server.start_saga("order", {})
            received = read.until(6)
    assert types_by_saga([one for one in received if one.topic == topic]) == {
        saga_id: ["SAGA_STARTED", "SAGA_RUNNING", "SAGA_COMPENSATING", "SAGA_COMPENSATION_FAILED", "SAGA_FAILED"]
    }
    (copy,) = (one for one in received if one.topic == f"{topic}.dlq")
    assert copy.event_type == "SAGA_COMPENSATION_FAILED"
    assert "reserve" in copy.value["error_message"]


def test_without_a_broker_sagas_run_readiness_says_degraded_and_the_events_come_later(
    tmp_path: Path, mock_broker: MockBroker
) -> None:
    topic = mock_broker.topic()
    mock_broker.down()
    with participant(flavour="grpclib", script={}) as shop:
        config = {"services": {"shop": shop.settings()}, "kafka": kafka(mock_broker, topic), "saga": {"lease_secs": 1}}
        with server_process(tmp_path, config) as server:
            server.start()
            server.register(ORDER)
            saga_ids = [server.start_saga("order", {}) for _ in range(5)]
            for saga_id in saga_ids:
                assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
            status, ready = server.call("GET", "/readyz")
            assert (status, ready["status"], ready["checks"]["kafka"]) == (200, "degraded", "unavailable")
            _until(lambda: metric(server, "saga_outbox_pending") == 15)
            assert metric(server, "saga_outbox_oldest_seconds") > 0
            mock_broker.up()
            with reader(mock_broker, topic) as read:
                received = read.until(15)
            _until(lambda: metric(server, "saga_outbox_published_total") == 15)
            _until(lambda: metric(server, "saga_outbox_pending") == 0)
            _until(lambda: server.call("GET", "/readyz")[1]["status"] == "healthy")
            assert server.log.count("relay_stalled") == 1
    assert types_by_saga(received) == {
        saga_id: ["SAGA_STARTED", "SAGA_RUNNING", "SAGA_COMPLETED"] for saga_id in saga_ids
    }


def test_a_server_killed_while_it_publishes_loses_no_event(
    tmp_path: Path, broker: AnyBroker, postgres_dsn: str
) -> None:
    topic = broker.topic()
    with participant(flavour="grpcio", script={"*": [{"delay_secs": 0.05}]}) as shop:
        config = {
            "services": {"shop": shop.settings()},
            "kafka": kafka(broker, topic),
            "saga": {"lease_secs": 1, "max_concurrent": 20},
        }
        with server_process(tmp_path, config, env={"DATABASE_URL": postgres_dsn}) as server:
            server.start()
            server.register(ORDER)
            with reader(broker, topic) as read:
                saga_ids = [server.start_saga("order", {"number": number}) for number in range(60)]
                read.until(70)
                server.kill()
                server.start()
                for saga_id in saga_ids:
                    assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
                received = read.until(180)
    assert types_by_saga(received) == {
        saga_id: ["SAGA_STARTED", "SAGA_RUNNING", "SAGA_COMPLETED"] for saga_id in saga_ids
    }


def test_a_broker_that_hangs_does_not_hold_up_a_stop(tmp_path: Path, mock_broker: MockBroker) -> None:
    topic = mock_broker.topic()
    with (
        participant(flavour="grpclib", script={}) as shop,
        line_to(int(mock_broker.bootstrap.rpartition(":")[2]), stands_in=True) as line,
    ):
        config = {
            "services": {"shop": shop.settings()},
            "kafka": {"brokers": [f"127.0.0.1:{line.port}"], "topics": {"publish": topic}},
        }
        with server_process(tmp_path, config) as server:
            server.start()
            server.register(ORDER)
            server.start_saga("order", {})
            _until(lambda: metric(server, "saga_outbox_published_total") == 3)
            line.freeze()
            server.ended(server.start_saga("order", {}))
            server.signal(signal.SIGTERM)
            began = time.monotonic()
            assert server.wait() == 0
            print(f"stopped after {time.monotonic() - began:.1f} s")
            # Three seconds, and what a machine needs that has other things to do.
            assert time.monotonic() - began < 7
            line.thaw()


def test_credentials_for_the_broker_do_not_reach_the_log(tmp_path: Path) -> None:
    config = {
        "kafka": {
            "brokers": [f"127.0.0.1:{free_port()}"],
            "security_protocol": "SASL_PLAINTEXT",
            "sasl": {"mechanism": "SCRAM-SHA-512", "username": "me", "password": "hunter2"},
        }
    }
    with server_process(tmp_path, config) as server:
        server.start()
        _until(lambda: "relay_stalled" in server.log)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "hunter2" not in server.log


def _until(holds: Any) -> None:
    """Waits for another process to get there; fails when it does not."""
    give_up_at = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)  # nothing to wait on but its answer
