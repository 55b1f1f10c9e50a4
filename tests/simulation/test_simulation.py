"""Twenty thousand sagas amid crashes, lost replies, lost leases, cancels and duplicate requests: no rule is broken."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.simulation.campaign import SAGAS_IN_A_RUN, simulate
from tests.simulation.world import World

EXPECTED = [
    "broker away",
    "broker: acknowledgement lost",
    "broker: connection breaks",
    "broker: message refused for good",
    "call: never left",
    "call: reply lost",
    "call: reply never comes",
    "call: reply slow",
    "call: request delivered twice",
    "call: request held up",
    "client: cancel",
    "client: duplicate request",
    "client: gone in the middle of a request",
    "client: key used again for another request",
    "crash: after a call",
    "crash: after a write",
    "crash: at an instant",
    "crash: before a call",
    "crash: before a write",
    "crash: during a write",
    "database down",
    "database: lands after it failed",
    "database: reply lost",
    "database: request lost",
    "lease lost: cut off",
    "notice lost",
    "operator: compensation run again",
    "worker stopped",
]
"""Kinds of faults without which a campaign would prove less than it says."""


def test_no_rule_is_broken_in_twenty_thousand_sagas_amid_faults_of_every_kind() -> None:
    report = simulate(20_000, seed=1_000, processes=2)
    assert report.violations == [], report.told()
    assert report.sagas >= 20_000
    assert [kind for kind in EXPECTED if report.faults[kind] < 5] == []
    assert report.ends.keys() == {"COMPLETED", "FAILED", "CANCELLED"}


@pytest.mark.parametrize("seed", range(5))
def test_no_rule_is_broken_over_the_sql_of_the_embedded_store(seed: int) -> None:
    outcome = World(seed, 100, real_sql=True).run()
    assert outcome.violations == []
    assert outcome.sagas > 50


def test_a_seed_plays_again_byte_for_byte() -> None:
    first = World(7, SAGAS_IN_A_RUN, tell=True).run()
    again = World(7, SAGAS_IN_A_RUN, tell=True).run()
    assert first.told == again.told
    assert first == again
    assert World(8, SAGAS_IN_A_RUN).run().trace != first.trace


def test_a_seed_plays_again_in_another_process_with_other_hashes() -> None:
    here = World(11, SAGAS_IN_A_RUN).run().trace
    code = f"from tests.simulation.world import World; print(World(11, {SAGAS_IN_A_RUN}).run().trace)"
    there = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "4711"}, stdout=subprocess.PIPE, text=True
    )
    assert there.stdout.strip() == here
