"""TLS to Postgres: every `ssl_mode` against servers that speak it and one that does not, and client certificates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bridge import open_loop, run_aio
from server.config import DatabaseConfig, SslMode
from store.errors import StoreRefuses
from store.postgres import open_postgres
from store.postgres_connections import connect
from store.postgres_errors import translated
from tests.store.samples import new_saga
from tests.support.certificates import Certificate, certificate
from tests.support.postgres import PostgresServer, running_server

ACCESS = (
    "hostssl all plain_only all reject",
    "hostnossl all tls_only all reject",
    "hostssl all with_certificate all cert",
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """What the server shows: good for localhost, and not for 127.0.0.1."""
    return certificate(tmp_path_factory.mktemp("postgres-tls"), "localhost")


@pytest.fixture(scope="module")
def tls_server(shown: Certificate) -> Iterator[PostgresServer]:
    with running_server(tls=shown, access=ACCESS) as server:
        server.execute(*(f"CREATE ROLE {name} LOGIN" for name in ("plain_only", "tls_only", "with_certificate")))
        yield server


async def encrypted(server: PostgresServer, mode: SslMode, **more: Any) -> bool:
    """Whether a connection that came about is a TLS one."""
    config = msgspec.structs.replace(
        DatabaseConfig(name="postgres", user="postgres", host="localhost", port=server.port, ssl_mode=mode), **more
    )

    async def ask() -> bool:
        with translated():
            connection = await connect(config.dsn())
            try:
                answer: bool = await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
                return answer
            finally:
                await connection.close()

    async with open_loop():
        return await run_aio(ask())


async def refused(server: PostgresServer, mode: SslMode, **more: Any) -> str:
    """Why there is no connection, and will be none until a person changes something."""
    with pytest.raises(BaseExceptionGroup) as caught:
        await encrypted(server, mode, **more)
    (error,) = _leaves(caught.value)
    assert isinstance(error, StoreRefuses)
    return str(error)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]


@pytest.mark.parametrize("mode", list(SslMode))
async def test_each_mode_speaks_tls_to_a_server_that_does_as_libpq_would(
    tls_server: PostgresServer, shown: Certificate, mode: SslMode
) -> None:
    expected = mode not in (SslMode.DISABLE, SslMode.ALLOW)  # `allow` does without as long as it may
    assert await encrypted(tls_server, mode, ssl_root_cert=shown.ca_file) is expected


@pytest.mark.parametrize("mode", list(SslMode))
async def test_each_mode_insists_on_tls_with_a_server_that_has_none_or_does_without(
    postgres_server: PostgresServer, shown: Certificate, mode: SslMode
) -> None:
    if mode in (SslMode.DISABLE, SslMode.ALLOW, SslMode.PREFER):
        assert await encrypted(postgres_server, mode, ssl_root_cert=shown.ca_file) is False
    else:
        assert "rejected SSL upgrade" in await refused(postgres_server, mode, ssl_root_cert=shown.ca_file)


async def test_the_modes_between_take_the_other_way_when_the_server_refuses_one(tls_server: PostgresServer) -> None:
    assert await encrypted(tls_server, SslMode.ALLOW, user="tls_only") is True
    assert await encrypted(tls_server, SslMode.PREFER, user="plain_only") is False
    assert "rejects connection" in await refused(tls_server, SslMode.DISABLE, user="tls_only")
    assert "rejects connection" in await refused(tls_server, SslMode.REQUIRE, user="plain_only")


async def test_verifying_modes_hold_the_certificate_against_the_authority_and_the_last_one_against_the_host(
    tls_server: PostgresServer, shown: Certificate, tmp_path: Path
) -> None:
    stranger = certificate(tmp_path, by="other").ca_file
    assert await encrypted(tls_server, SslMode.REQUIRE) is True
    for mode in (SslMode.VERIFY_CA, SslMode.VERIFY_FULL):
        assert "certificate verify failed" in await refused(tls_server, mode, ssl_root_cert=stranger)
    by_address = {"host": "127.0.0.1", "ssl_root_cert": shown.ca_file}
    assert await encrypted(tls_server, SslMode.VERIFY_CA, **by_address) is True
    assert "not valid for '127.0.0.1'" in await refused(tls_server, SslMode.VERIFY_FULL, **by_address)


async def test_verifying_without_an_authority_is_refused_with_words(
    tls_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGSSLROOTCERT", raising=False)
    assert "root certificate file" in await refused(tls_server, SslMode.VERIFY_FULL)


async def test_a_server_that_wants_a_certificate_is_shown_ours(
    tls_server: PostgresServer, shown: Certificate, tmp_path: Path
) -> None:
    who = {"user": "with_certificate", "ssl_root_cert": shown.ca_file}
    ours = certificate(tmp_path, common_name="with_certificate", called="ours")
    theirs = certificate(tmp_path, common_name="somebody_else", called="theirs")
    files = {"ssl_cert": ours.cert_file, "ssl_key": ours.key_file}
    assert await encrypted(tls_server, SslMode.VERIFY_FULL, **who, **files) is True
    assert "certificate" in await refused(tls_server, SslMode.VERIFY_FULL, **who)
    files = {"ssl_cert": theirs.cert_file, "ssl_key": theirs.key_file}
    assert "certificate authentication failed" in await refused(tls_server, SslMode.VERIFY_FULL, **who, **files)


async def test_the_store_works_over_verified_tls(tls_server: PostgresServer, shown: Certificate) -> None:
    with tls_server.empty_database() as dsn:
        config = DatabaseConfig(
            name=dsn.rpartition("/")[2],
            user="postgres",
            host="localhost",
            port=tls_server.port,
            ssl_mode=SslMode.VERIFY_FULL,
            ssl_root_cert=shown.ca_file,
        )
        async with open_loop(), open_postgres(config.dsn(), events=True) as store:
            new = new_saga()
            await store.create(new)
            found = await store.get(new.saga_id)
            assert found is not None
            assert found.payload == new.payload
