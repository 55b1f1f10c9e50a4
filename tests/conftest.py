"""Fixtures every test folder shares: a Postgres server for the session, a database of its own for each test."""

from __future__ import annotations

import bridge  # noqa: F401  isort: skip  (imports trio_asyncio before anything imports grpclib)

from collections.abc import Iterator

import pytest

from tests.support.postgres import PostgresServer, running_server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server with a migrated template database."""
    with running_server() as server:
        server.make_template()
        yield server


@pytest.fixture
def postgres_dsn(postgres_server: PostgresServer) -> Iterator[str]:
    """A migrated, empty database of the test's own."""
    with postgres_server.cloned_database() as dsn:
        yield dsn
