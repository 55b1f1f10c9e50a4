"""`make bench ARGS=--safety`: what it costs that nothing is lost, and how soon work goes on after a kill.

One, two and three workers on one Postgres; a worker without events, with events in the outbox, and with events that it
publishes itself; a worker that is killed with sagas open. Each measurement is a process of its own; what is compared is
measured in turns, as machines are noisy.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from bench.engine import STEPS
from bench.processes import measured, participant, say
from tests.support.kafka import running_broker
from tests.support.postgres import PostgresServer, running_server

WORKERS = (1, 2, 3)
EVENTS = ("none", "stored", "published")
TURNS = 4


def run(scale: float) -> dict[str, Any]:
    """All measurements; `scale` shortens them (1: as published)."""
    results: dict[str, Any] = {"cores": os.cpu_count(), "python": sys.version.split()[0]}
    with running_server(durable=True) as server, participant() as port:
        server.make_template()
        results["postgres"] = server.version
        sagas = int(6000 * scale)
        results["workers"] = [_workers(server, port, count, sagas) for count in WORKERS]
        results["events"] = _events(server, port, int(3000 * scale))
        sagas = int(10_000 * scale)
        say(f"recovery of {sagas} sagas ...")
        with server.cloned_database() as dsn:
            results["recovery"] = measured("bench.recovery", "--store", dsn, "--port", port, "--sagas", sagas)
    return results


def _workers(server: PostgresServer, port: int, count: int, sagas: int) -> dict[str, Any]:
    say(f"{count} workers: {sagas} sagas each ...")
    with server.cloned_database() as dsn:
        arguments = ["--store", dsn, "--port", str(port), "--sagas", str(sagas), "--in-flight", "100"]
        running = [
            subprocess.Popen([sys.executable, "-m", "bench.engine", *arguments], stdout=subprocess.PIPE)
            for _ in range(count)
        ]
        each = [json.loads(one.communicate()[0]) for one in running]
    return {
        "workers": count,
        "sagas_per_s": sum(one["sagas_per_s"] for one in each),
        "cpu_us_per_step": sum(one["cpu_us_per_step"] for one in each) / count,
        "p50_ms": max(one["p50_ms"] for one in each),
        "p99_ms": max(one["p99_ms"] for one in each),
    }


def _events(server: PostgresServer, port: int, sagas: int) -> list[dict[str, Any]]:
    """The median of the turns, by what becomes of events."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in EVENTS}
    with running_broker() as broker:
        for turn in range(TURNS):
            for kind in EVENTS if turn % 2 else reversed(EVENTS):
                say(f"events {kind}: {sagas} sagas ...")
                arguments: list[object] = ["--events" if kind != "none" else "--no-events"]
                if kind == "published":
                    arguments = ["--bootstrap", broker.bootstrap, "--topic", broker.topic(6)]
                with server.cloned_database() as dsn:
                    found[kind].append(
                        measured("bench.engine", "--store", dsn, "--port", port, "--sagas", sagas, *arguments)
                    )
    return [
        {
            "events": kind,
            "sagas_per_s": statistics.median(one["sagas_per_s"] for one in turns),
            "cpu_us_per_step": statistics.median(one["cpu_us_per_step"] for one in turns),
        }
        for kind, turns in found.items()
    ]


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    without = results["events"][0]["sagas_per_s"]
    recovery = results["recovery"]
    lines = [
        f"{STEPS}-step sagas, 100 in flight a worker, all on one Postgres; participant in its own process, "
        f"{results['cores']} cores, Python {results['python']}, PostgreSQL {results['postgres']} (fsync on), events "
        "written to the outbox. Sagas/s are the sum over the workers, which run at the same time.",
        "",
        f"{'workers':>7} {'sagas/s':>8} {'CPU us/step':>11} {'p50 ms':>7} {'p99 ms':>7}",
    ]
    lines += [
        f"{one['workers']:>7} {one['sagas_per_s']:>8.0f} {one['cpu_us_per_step']:>11.0f} {one['p50_ms']:>7.1f} "
        f"{one['p99_ms']:>7.1f}"
        for one in results["workers"]
    ]
    lines += ["", f"{'events':<9} {'sagas/s':>8} {'ratio':>6} {'CPU us/step':>11}"]
    lines += [
        f"{one['events']:<9} {one['sagas_per_s']:>8.0f} {one['sagas_per_s'] / without:>6.2f} "
        f"{one['cpu_us_per_step']:>11.0f}"
        for one in results["events"]
    ]
    lines += [
        "",
        f"SIGKILL with {recovery['open_at_the_kill']} sagas open: another worker ended them in "
        f"{recovery['recovery_s']:.1f} s; as many without a kill: {recovery['normal_s']:.1f} s; "
        f"ratio {recovery['ratio']:.2f} (goal <= 1.2)",
    ]
    return "\n".join(lines)
