"""Fixtures every test folder shares: a Postgres server for the session, a database of its own for each test, an issuer
of tokens for each module."""

from __future__ import annotations

import bridge  # noqa: F401  isort: skip  (imports trio_asyncio before anything imports grpclib)

import signal
from collections.abc import Iterator

import pytest

from tests.support.issuer import Issuer, issuer
from tests.support.postgres import PostgresServer, running_server

# A shell without job control starts what it puts into the background with SIGINT ignored, and children inherit that;
# the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="module")
def idp() -> Iterator[Issuer]:
    """An issuer of tokens, over real HTTP."""
    with issuer() as opened:
        yield opened
