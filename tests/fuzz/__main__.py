"""Fuzzing in numbers, outside of the tests:

    python -m tests.fuzz --cases 10000        # as many REST requests, on each store, and gRPC calls and frames; ten
                                              # times as many definitions
    python -m tests.fuzz --hostile 10000      # that many requests of each hostile kind: what the server grew by, and
                                              # how long others waited; --tls: the same over TLS

Ends with an error on the first thing that must not be; requests of REST are told in a table first.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import trio

from tests.fuzz import contract, definitions, hostile, wire
from tests.fuzz.target import GROWTH_BYTES, GROWTH_WARM_BYTES, target
from tests.support.postgres import running_server

MIB = 1024 * 1024

NOTICED_SECS = 1.0
"""How long others may wait for an answer while fifty connections are hostile. A guess at what nobody takes for more
than a busy server; on idle cores, since these wait for whatever else the machine does, too."""


def main() -> None:
    options = argparse.ArgumentParser(description="fuzzing")
    options.add_argument("--cases", type=int, default=0, help="REST requests of each store; gRPC calls and connections")
    options.add_argument("--definitions", type=int, help="damaged definitions; default: ten times the cases")
    options.add_argument("--hostile", type=int, default=0, help="requests of each hostile kind")
    options.add_argument("--kinds", default="", help="only hostile kinds in whose names this expression is found")
    options.add_argument("--tls", action="store_true", help="the hostile requests over TLS")
    options.add_argument("--seed", type=int, help="default: another one each time")
    chosen = options.parse_args()
    seed = time.time_ns() % 2**32 if chosen.seed is None else chosen.seed
    print(f"seed {seed}", flush=True)
    if chosen.cases:
        _contract("SQLite", chosen.cases, seed)
        with running_server() as postgres:
            postgres.make_template()
            with postgres.cloned_database() as dsn:
                _contract("PostgreSQL", chosen.cases, seed + chosen.cases, {"DATABASE_URL": dsn})
        _wire(chosen.cases, seed)
    if chosen.hostile:
        _hostile(chosen.hostile, chosen.tls, chosen.kinds)
    if count := 10 * chosen.cases if chosen.definitions is None else chosen.definitions:
        started = time.monotonic()
        seen = definitions.run(count, seed)
        print(f"definitions: {dict(seen)}, {time.monotonic() - started:.0f} s", flush=True)


def _contract(store: str, cases: int, seed: int, env: Mapping[str, str] | None = None) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ran = contract.run(Path(folder), cases, seed, env)
    print(f"REST on {store}: {ran.cases} requests, {len(ran.faults)} faults; grown by {ran.grown >> 10} KiB,", end=" ")
    print(f"{time.monotonic() - started:.0f} s\n{ran.table()}", flush=True)
    assert ran.faults == [], "\n".join(ran.faults[:20])
    assert ran.grown < GROWTH_BYTES, ran.grown


def _wire(cases: int, seed: int) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, target(Path(folder)) as server:
        seen, grown = trio.run(wire.run, server.grpc_port, cases, seed, server.rss)
        server.check()
    told = ", ".join(f"{what}: {count}" for what, count in sorted(seen.items()))
    print(f"gRPC: {told}; grown by {grown >> 10} KiB, {time.monotonic() - started:.0f} s", flush=True)
    assert grown < GROWTH_BYTES, grown


def _hostile(count: int, tls: bool, wanted: str) -> None:
    print(f"hostile requests{' over TLS' if tls else ''}, {count} of each kind", flush=True)
    with tempfile.TemporaryDirectory() as folder, target(Path(folder), tls=tls) as server:
        doors, trusting = (server.port, server.grpc_port), server.trusting if tls else None
        begun_with = server.rss()
        for name, port, kind in hostile.kinds(*doors):
            if not re.search(wanted, name):
                continue
            started = time.monotonic()
            seen = trio.run(hostile.run, port, kind, count, server.rss, doors, trusting)
            server.check()
            print(
                f"{name}: {seen.first / MIB:+.1f} MiB, then {seen.second / MIB:+.1f} MiB, "
                f"others waited {seen.known_secs * 1000:.0f} ms at most, "
                f"on a new connection {seen.new_secs * 1000:.0f} ms; {time.monotonic() - started:.0f} s",
                flush=True,
            )
            assert seen.first < GROWTH_BYTES, (name, seen)
            assert seen.second < GROWTH_WARM_BYTES, (name, seen)
            assert max(seen.known_secs, seen.new_secs) < NOTICED_SECS, (name, seen)
        print(f"begun with {begun_with / MIB:.0f} MiB, ended with {server.rss() / MIB:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
