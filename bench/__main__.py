"""`make bench`: the figures of the engine, in one run on one machine, with raw grpclib calls as the yardstick.

Each measurement is a process of its own (`engine.py`, `raw.py`); the participant is another, Postgres a third. Machines
are noisy: the yardstick is measured before and after each engine run, and the ratios are what to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import doors, safety
from bench.engine import STEPS
from bench.processes import measured, participant, say
from tests.support.kafka import running_broker
from tests.support.postgres import PostgresServer, running_server

FLOOR_RATIO = 0.45
"""Steps a second over raw calls a second, at least (the project's own goal)."""
ALONE_MS = {"postgres": 15.0, "sqlite": 10.0}
BACKLOG_MB = 200.0


@contextmanager
def store_of(kind: str, server: PostgresServer, folder: Path) -> Iterator[str]:
    """A fresh store of a kind: a DSN or the path of a file."""
    if kind == "postgres":
        with server.cloned_database() as dsn:
            yield dsn
    else:
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            yield f"{inner}/saga.sqlite3"


def run(scale: float) -> dict[str, Any]:
    """All measurements; `scale` shortens them (1: as published)."""
    results: dict[str, Any] = {"cores": os.cpu_count(), "python": sys.version.split()[0], "runs": []}
    # Not /tmp, which may be memory: commits have to reach a disk.
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder,
        running_server(durable=True) as server,
        participant() as port,
    ):
        server.make_template()
        results["postgres"] = server.version
        for kind in ("postgres", "sqlite"):
            for in_flight, sagas in ((100, int(6000 * scale)), (1, int(400 * scale))):
                say(f"{kind}, {in_flight} in flight: {sagas} sagas ...")
                calls = sagas * STEPS
                before = measured("bench.raw", port, calls, in_flight)["calls_per_s"]
                with store_of(kind, server, Path(folder)) as store:
                    figures = measured(
                        "bench.engine", "--store", store, "--port", port, "--sagas", sagas, "--in-flight", in_flight
                    )
                after = measured("bench.raw", port, calls, in_flight)["calls_per_s"]
                raw = (before + after) / 2
                results["runs"].append(
                    {
                        "store": kind,
                        "in_flight": in_flight,
                        "sagas": sagas,
                        "raw_calls_per_s": raw,
                        "ratio": figures["steps_per_s"] / raw,
                        **figures,
                    }
                )
        results["backlog"] = {}
        for kind in ("postgres", "sqlite"):
            waiting = int(50_000 * scale)
            say(f"{kind}, {waiting} waiting ...")
            with store_of(kind, server, Path(folder)) as store:
                results["backlog"][kind] = measured(
                    "bench.engine", "--store", store, "--port", port, "--sagas", waiting, "--backlog"
                )
        results["relay"] = {}
        for kind in ("postgres", "sqlite"):
            sagas = int(20_000 * scale)
            say(f"relay on {kind}: the events of {sagas} sagas ...")
            with store_of(kind, server, Path(folder)) as store, running_broker() as broker:
                results["relay"][kind] = measured(
                    "bench.relay",
                    *("--store", store, "--bootstrap", broker.bootstrap, "--topic", broker.topic(6), "--sagas", sagas),
                )
    return results


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"{STEPS}-step sagas, participant in its own process, {results['cores']} cores, Python {results['python']}, "
        f"PostgreSQL {results['postgres']} (fsync on), events written to the outbox",
        "",
        f"{'store':<9} {'in flight':>9} {'sagas/s':>8} {'steps/s':>8} {'raw/s':>7} {'ratio':>6} "
        f"{'CPU us/step':>11} {'p50 ms':>7} {'p99 ms':>7} {'batch':>6}",
    ]
    lines += [
        f"{one['store']:<9} {one['in_flight']:>9} {one['sagas_per_s']:>8.0f} {one['steps_per_s']:>8.0f} "
        f"{one['raw_calls_per_s']:>7.0f} {one['ratio']:>6.2f} {one['cpu_us_per_step']:>11.0f} {one['p50_ms']:>7.1f} "
        f"{one['p99_ms']:>7.1f} {one['mean_batch']:>6.1f}"
        for one in results["runs"]
    ]
    lines += ["", f"{'store':<9} {'waiting':>9} {'starts/s':>8} {'memory MB':>9}"]
    lines += [
        f"{kind:<9} {one['waiting']:>9} {one['starts_per_s']:>8.0f} {one['rss_mb']:>9.0f}"
        for kind, one in results["backlog"].items()
    ]
    lines += ["", f"{'relay on':<9} {'events/s':>9} {'CPU us/event':>12} {'grown MB':>9}"]
    lines += [
        f"{kind:<9} {one['events_per_s']:>9.0f} {one['cpu_us_per_event']:>12.0f} {one['grown_mb']:>9.1f}"
        for kind, one in results["relay"].items()
    ]
    lines += ["", *goals(results)]
    return "\n".join(lines)


def goals(results: dict[str, Any]) -> list[str]:
    """Each goal with what was measured."""
    lines = []
    for one in results["runs"]:
        if one["in_flight"] == 1:
            goal = ALONE_MS[one["store"]]
            lines.append(
                _goal(f"alone on {one['store']}: p50 {one['p50_ms']:.1f} ms", one["p50_ms"] <= goal, f"<= {goal:g}")
            )
        elif one["store"] == "postgres":
            met = one["ratio"] >= FLOOR_RATIO
            lines.append(_goal(f"steps/s over raw calls/s on postgres: {one['ratio']:.2f}", met, f">= {FLOOR_RATIO}"))
    for kind, one in results["backlog"].items():
        lines.append(
            _goal(
                f"{one['waiting']} waiting on {kind}: {one['rss_mb']:.0f} MB",
                one["rss_mb"] < BACKLOG_MB,
                f"< {BACKLOG_MB:g}",
            )
        )
    return lines


def _goal(what: str, met: bool, goal: str) -> str:
    return f"{'met   ' if met else 'MISSED'}  {what} (goal {goal})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench", description="Measures the engine; prints a table.")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="0.1: a tenth of the sagas, for a quick look")
    parser.add_argument("--safety", action="store_true", help="instead: several workers, events, recovery")
    parser.add_argument("--doors", action="store_true", help="instead: access control, TLS, masking, tracing")
    options = parser.parse_args()
    if options.safety:
        figures = safety.run(options.scale)
        text = safety.table(figures)
    elif options.doors:
        figures = doors.run(options.scale)
        text = doors.table(figures)
    else:
        figures = run(options.scale)
        text = table(figures)
    print(json.dumps(figures, indent=2) if options.json else text)
