"""The stores that servers in this folder remember in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(params=["sqlite", "postgres"])
def store_config(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What the environment says of the store."""
    if request.param == "sqlite":
        yield {}
    else:
        yield {"DATABASE_URL": request.getfixturevalue("postgres_dsn")}
