"""Many runs, one seed each, on one core or several; what they came to in one report."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing

import msgspec

from tests.simulation.world import Outcome, World

SAGAS_IN_A_RUN = 200
"""Enough for the sagas of one run to get into each other's way, few enough to read the trace of one."""


class Report(msgspec.Struct, kw_only=True):
    """All runs together. `violations`: seed and rule; that seed alone shows it again."""

    runs: int = 0
    sagas: int = 0
    attempts: int = 0
    moves: int = 0
    events: int = 0
    seconds: float = 0.0
    virtual_secs: float = 0.0
    faults: Counter[str] = msgspec.field(default_factory=Counter)
    ends: Counter[str] = msgspec.field(default_factory=Counter)
    violations: list[tuple[int, str]] = []

    def add(self, outcome: Outcome) -> None:
        self.runs += 1
        self.sagas += outcome.sagas
        self.attempts += outcome.attempts
        self.moves += outcome.moves
        self.events += outcome.events
        self.virtual_secs += outcome.virtual_secs
        self.faults.update(outcome.faults)
        self.ends.update(outcome.ends)
        self.violations += [(outcome.seed, violation) for violation in outcome.violations]

    def told(self) -> str:
        """The report as lines for people."""
        lines = [
            f"{self.sagas:,} sagas in {self.runs:,} runs, {self.seconds:.0f} s "
            f"({self.sagas / max(self.seconds, 0.001):.0f} sagas/s), {self.virtual_secs / 3600:,.1f} h of virtual time",
            f"{self.attempts:,} attempts, {self.moves:,} moves, {self.events:,} events, "
            + ", ".join(f"{number:,} {end}" for end, number in sorted(self.ends.items())),
            f"faults: {self.faults.total():,}",
            *(f"  {number:>12,}  {kind}" for kind, number in sorted(self.faults.items())),
            f"violations: {len(self.violations)}",
            *(f"  seed {seed}: {violation}" for seed, violation in self.violations[:20]),
        ]
        return "\n".join(lines)


def one_run(seed: int) -> Outcome:
    return World(seed, SAGAS_IN_A_RUN).run()


def simulate(sagas: int, seed: int, *, processes: int = 1, progress: Callable[[Report], None] | None = None) -> Report:
    """Runs with the seeds `seed`, `seed + 1`, … until there were that many sagas; stops at the first run that broke a
    rule, for a broken engine breaks it often."""
    report = Report()
    began = time.perf_counter()
    with closing(_outcomes(seed, processes)) as outcomes:
        for outcome in outcomes:
            report.add(outcome)
            report.seconds = time.perf_counter() - began
            if progress is not None:
                progress(report)
            if report.sagas >= sagas or report.violations:
                return report
    raise AssertionError("seeds do not run out")


def _outcomes(seed: int, processes: int) -> Generator[Outcome, None, None]:
    seeds = itertools.count(seed)
    if processes == 1:
        yield from map(one_run, seeds)
        return
    # Spawned, not forked: the caller may have threads. In the order of the seeds, so that a campaign is the same again.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = deque(pool.submit(one_run, next(seeds)) for _ in range(processes * 4))
        try:
            while True:
                running.append(pool.submit(one_run, next(seeds)))
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
