"""The stores the shared suite runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from saga.ports import Store
from tests.store.samples import Database, StandingClock


@pytest.fixture(params=["postgres", "sqlite_file", "sqlite_memory", "simulated"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    kind: str = request.param
    if kind == "postgres":
        return Database(kind, request.getfixturevalue("postgres_dsn"))
    return Database(kind, str(tmp_path / "saga.db") if kind == "sqlite_file" else ":memory:")


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock()


@pytest.fixture
async def store(database: Database, clock: StandingClock) -> AsyncIterator[Store]:
    """A store with events on, empty, one for each database."""
    async with database.opened(clock) as opened:
        yield opened
