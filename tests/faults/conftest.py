"""The stores that servers in this folder remember in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.postgres import PostgresServer, running_server


@pytest.fixture(params=["sqlite", "postgres"])
def store_config(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What the environment says of the store."""
    if request.param == "sqlite":
        yield {}
    else:
        yield {"DATABASE_URL": request.getfixturevalue("postgres_dsn")}


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may stop and crash: no other folder uses it."""
    with running_server() as server:
        server.make_template()
        yield server


@pytest.fixture
def breakable(own_postgres: PostgresServer) -> Iterator[tuple[PostgresServer, str]]:
    """That server, and the DSN of a migrated database of the test's own on it."""
    with own_postgres.cloned_database() as dsn:
        try:
            yield own_postgres, dsn
        finally:
            if not own_postgres.is_running:
                own_postgres.start()
