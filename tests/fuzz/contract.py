"""The contract tests in numbers: schemathesis as each role, round after round, and how much the server has grown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.contract import campaign
from tests.contract.landscape import ROLES, landscape

EXAMPLES = 60
"""Random requests of each operation in a round, and random chains of them."""


class Ran:
    """What came of it. `grown`: bytes, from when a tenth of it was done, after which caches are full."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, str, int]] = Counter()
        self.faults: list[str] = []
        self.grown = 0

    @property
    def cases(self) -> int:
        return self.statuses.total()

    def table(self) -> str:
        """A line for each operation and role: how many requests, and how often each status was the answer."""
        lines = []
        for operation, name in sorted({(operation, name) for operation, name, _ in self.statuses}):
            told = {status: n for (one, who, status), n in self.statuses.items() if (one, who) == (operation, name)}
            by_status = ", ".join(f"{status}: {count}" for status, count in sorted(told.items()))
            lines.append(f"  {operation:48} {name:8} {sum(told.values()):6}  {by_status}")
        return "\n".join(lines)


def run(folder: Path, cases: int, seed: int, env: Mapping[str, str] | None = None) -> Ran:
    """At least so many requests; each role has the same number of rounds, each round a seed of its own."""
    ran = Ran()
    warm = 0
    with landscape(folder, env) as land:
        while ran.cases < cases:
            for name in ROLES:
                outcome = campaign.run(land, name, examples=EXAMPLES, seed=seed)
                for (operation, status), count in outcome.statuses.items():
                    ran.statuses[operation, name, status] += count
                ran.faults += outcome.faults
                if warm == 0 and ran.cases >= cases // 10:
                    warm = land.target.rss()
            seed += 1
        ran.grown = land.target.rss() - warm
        land.target.check()
    return ran
