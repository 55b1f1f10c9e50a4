"""What one worker says of another that has not said anything itself for a while."""

from __future__ import annotations

import os
from pathlib import Path

from saga.model import SagaStatus
from web.metrics import PrometheusMeter
from web.shared_metrics import SILENT_SECS, SharedMetrics


def worker(folder: Path, number: int) -> tuple[PrometheusMeter, SharedMetrics]:
    meter = PrometheusMeter()
    meter.read_gauge("saga_ready", "Ready", lambda: 1.0)
    meter.read_gauge("saga_active", "Active", lambda: 7.0)
    meter.tell_build(version="1")
    meter.saga_started("order")
    meter.saga_ended("order", SagaStatus.COMPLETED, 0.2)
    return meter, SharedMetrics(meter.registry, folder, number)


def series(text: bytes, worker: int) -> dict[str, float]:
    """The values told of a worker, without when each was made."""
    found = {}
    for line in text.decode().splitlines():
        name, _, value = line.rpartition(" ")
        if f'worker="{worker}"' in name and "_created" not in name and name.startswith("saga_"):
            found[name.partition("{")[0]] = float(value)
    return found


async def test_a_silent_worker_is_not_ready_and_has_no_state_but_what_it_counted(tmp_path: Path) -> None:
    _, first = worker(tmp_path, 1)
    _, second = worker(tmp_path, 2)
    second._write(second._collected())
    lively = series(await first.render(), 2)
    assert (lively["saga_ready"], lively["saga_active"]) == (1.0, 7.0)

    file = tmp_path / "2.metrics"
    written_at = file.stat().st_mtime - SILENT_SECS - 1
    os.utime(file, (written_at, written_at))
    silent = series(await first.render(), 2)
    assert silent["saga_ready"] == 0.0
    assert {"saga_active", "saga_build_info"} == lively.keys() - silent.keys()
    assert silent["saga_started_total"] == lively["saga_started_total"] == 1.0
    assert silent["saga_duration_seconds_count"] == 1.0
    # Whoever is asked speaks for itself.
    assert series(await first.render(), 1)["saga_ready"] == 1.0

    second._write(second._collected())
    assert series(await first.render(), 2) == lively
