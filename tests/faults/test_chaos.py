"""A short run of `make chaos`: a few troubles each, on two and on three workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import run
from tests.support.postgres import PostgresServer


@pytest.mark.parametrize(
    ("workers", "seed", "troubles"),
    [
        pytest.param(2, 114, ("kill", "freeze", "lose_broker"), id="two-workers-and-the-broker"),
        pytest.param(3, 1167, ("kill", "hang_broker", "cut", "crash"), id="three-workers-postgres-and-the-broker"),
    ],
)
def test_workers_that_are_killed_under_load_lose_nothing_and_do_nothing_twice(
    tmp_path: Path, breakable: tuple[PostgresServer, str], workers: int, seed: int, troubles: tuple[str, ...]
) -> None:
    postgres, dsn = breakable
    done = run(tmp_path, postgres, dsn, workers=workers, seed=seed, troubles=troubles, is_over=lambda count: count >= 4)
    assert done["sagas"] > 0
