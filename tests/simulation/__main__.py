"""`make simulate`: many runs, or one of them told line by line."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.campaign import SAGAS_IN_A_RUN, Report, simulate
from tests.simulation.world import World

TELL_EVERY_SECS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--sagas", type=int, default=20_000, help="how many at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each further run takes the next")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--trace", action="store_true", help="tell the one run of this seed line by line")
    arguments = parser.parse_args()
    if arguments.trace:
        outcome = World(arguments.seed, SAGAS_IN_A_RUN, tell=True).run()
        sys.stdout.writelines(outcome.told or [])
        print(f"trace {outcome.trace}", *outcome.violations, sep="\n")
        return bool(outcome.violations)
    last = time.monotonic()

    def progress(report: Report) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_EVERY_SECS:
            last = time.monotonic()
            print(f"{report.sagas:,} sagas, {report.faults.total():,} faults, {report.seconds:.0f} s", flush=True)

    report = simulate(arguments.sagas, arguments.seed, processes=arguments.processes, progress=progress)
    print(report.told())
    for seed in sorted({seed for seed, _ in report.violations}):
        print(f"again: make simulate SEED={seed} ARGS=--trace")
    return bool(report.violations)


if __name__ == "__main__":
    sys.exit(main())
