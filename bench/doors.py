"""`make bench ARGS=--doors`: what access control, TLS, masking and tracing cost at the REST door.

A server as people run it, with one of them at a time and then all; started anew for each turn, in turns, as machines
are noisy. What is compared is the processor time of the server for a request, which its neighbours disturb less than
the rate. One saga is run at a time and finds nobody to call, so that what is measured is the door and the store.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.processes import measured, say
from tests.support.certificates import Certificate, certificate, client_context
from tests.support.collector import collector
from tests.support.issuer import Issuer, issuer, token_of
from tests.support.postgres import PostgresServer, running_server
from tests.support.server_process import ServerProcess, free_port, server_process

TURNS = 3
FEATURES = ("access", "tls", "masking", "tracing")
VARIANTS: dict[str, tuple[str, ...]] = {
    "none of them": (),
    "access control": ("access",),
    "TLS": ("tls",),
    "masking": ("masking",),
    "tracing": ("tracing",),
    "all of them": FEATURES,
}
WORKFLOW = """
name: order
steps:
  - {name: reserve, service: shop, method: Shop.Reserve, retry: {max_attempts: 1000, initial_interval_ms: 20000}}
"""


def run(scale: float) -> dict[str, Any]:
    """All measurements; `scale` shortens them (1: as published)."""
    requests = int(4000 * scale)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    # Not /tmp, which may be memory: commits have to reach a disk.
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as name,
        running_server(durable=True) as postgres,
        issuer() as idp,
        collector() as spans,
    ):
        postgres.make_template()
        folder = Path(name)
        made = certificate(folder)
        for turn in range(TURNS):
            for variant, features in VARIANTS.items() if turn % 2 else reversed(VARIANTS.items()):
                say(f"{variant}: {requests} starts and reads ...")
                with _server(folder, postgres, features, idp, made, spans.endpoint) as server:
                    found[variant].append(_turn(server, features, made, requests))
    return {
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "postgres": postgres.version,
        "doors": [
            {"with": variant, **{key: statistics.median(turn[key] for turn in turns) for key in turns[0]}}
            for variant, turns in found.items()
        ],
    }


@contextmanager
def _server(
    folder: Path, postgres: PostgresServer, features: tuple[str, ...], idp: Issuer, made: Certificate, collected: str
) -> Iterator[ServerProcess]:
    config: dict[str, Any] = {
        "services": {"shop": {"host": "127.0.0.1", "port": free_port()}},
        "saga": {"max_concurrent": 1, "workflow_dir": "workflows"},
        "observability": {},
    }
    if "access" in features:
        config["auth"] = idp.settings()
    env = {"SAGA__OBSERVABILITY__LOG__FORMAT": "json"}
    if "tls" in features:
        env |= {"SAGA__SERVER__TLS__CERT_FILE": made.cert_file, "SAGA__SERVER__TLS__KEY_FILE": made.key_file}
    if "masking" in features:
        config["observability"]["redact"] = ["card", "items.sku"]
    if "tracing" in features:
        config["observability"]["otlp"] = {"endpoint": collected}
    with ExitStack() as stack:
        inner = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        (inner / "workflows").mkdir()
        (inner / "workflows" / "order.yaml").write_text(WORKFLOW)
        env["DATABASE_URL"] = stack.enter_context(postgres.cloned_database())
        server = stack.enter_context(server_process(inner, config, env=env))
        server.spawn()
        _until_ready(server, made if "tls" in features else None)
        yield server


def _until_ready(server: ServerProcess, shown: Certificate | None) -> None:
    url = f"http://127.0.0.1:{server.port}/readyz"
    context = None
    if shown is not None:
        url = f"https://localhost:{server.port}/readyz"
        context = client_context(shown.ca_file)
    give_up_at = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5, context=context):
                return
        except (OSError, urllib.error.URLError):
            assert time.monotonic() < give_up_at, server.log
            time.sleep(0.05)


def _turn(server: ServerProcess, features: tuple[str, ...], made: Certificate, requests: int) -> dict[str, Any]:
    arguments: list[object] = ["--port", server.port]
    if "access" in features:
        arguments += ["--token", token_of("sys_operator")]
    if "tls" in features:
        arguments += ["--ca-file", made.ca_file]
    # Its imports and caches are warm then.
    saga_id = measured("bench.door_client", *arguments, "--requests", requests // 10)["answer"]["saga_id"]
    figures: dict[str, Any] = {}
    for kind, more in (("start", []), ("read", ["--read", saga_id])):
        before = _cpu_secs(server)
        done = measured("bench.door_client", *arguments, *more, "--requests", requests)
        figures[f"{kind}s_per_s"] = done["requests_per_s"]
        figures[f"cpu_us_per_{kind}"] = (_cpu_secs(server) - before) / requests * 1e6
    return figures


def _cpu_secs(server: ServerProcess) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    plain = results["doors"][0]
    lines = [
        f"REST, 32 connections, {results['cores']} cores, Python {results['python']}, PostgreSQL {results['postgres']} "
        "(fsync on), JSON logs to a file; ratio of processor time to the first line",
        "",
        f"{'with':<15} {'starts/s':>8} {'CPU us/start':>12} {'ratio':>6} "
        f"{'reads/s':>8} {'CPU us/read':>11} {'ratio':>6}",
    ]
    lines += [
        f"{one['with']:<15} {one['starts_per_s']:>8.0f} {one['cpu_us_per_start']:>12.0f} "
        f"{one['cpu_us_per_start'] / plain['cpu_us_per_start']:>6.2f} {one['reads_per_s']:>8.0f} "
        f"{one['cpu_us_per_read']:>11.0f} {one['cpu_us_per_read'] / plain['cpu_us_per_read']:>6.2f}"
        for one in results["doors"]
    ]
    return "\n".join(lines)
