"""What ends a start because a person has to mend it, what is waited for, and what the first lines say."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from server.cli import main
from tests.support.postgres import PostgresServer
from tests.support.server_process import free_port, server_process


def refusals(server: PostgresServer) -> dict[str, str]:
    """What is wrong, and a DSN in which it is."""
    address = f"127.0.0.1:{server.port}"
    return {
        'database "nowhere" does not exist': f"postgresql://postgres@{address}/nowhere",
        'role "nobody_known" does not exist': f"postgresql://nobody_known@{address}/postgres",
        "permission denied for database": f"postgresql://no_rights:s3cret-word@{address}/postgres",
        ".* rejected SSL upgrade": f"postgresql://postgres@{address}/postgres?sslmode=require",
    }


@pytest.fixture
def without_rights(postgres_server: PostgresServer) -> None:
    postgres_server.execute(
        "DO $$ BEGIN CREATE ROLE no_rights LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    )


@pytest.mark.usefixtures("without_rights")
@pytest.mark.parametrize("number", [0, 2, 3], ids=["database", "rights", "tls"])
def test_a_database_that_refuses_us_ends_the_start_with_its_reason(
    number: int, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    reason, dsn = list(refusals(postgres_server).items())[number]
    workers = ("--workers", "2") if number == 0 else ()
    with server_process(tmp_path, {}, *workers, env={"DATABASE_URL": dsn}) as server:
        server.spawn()
        assert server.wait() == 1
        told = f"the database refuses this server: {reason}.*; see `database` in the configuration"
        assert re.search(rf"^saga: (worker \d: )?{told}", server.log, re.MULTILINE)
        assert "Traceback" not in server.log
        assert "s3cret" not in server.log


@pytest.mark.usefixtures("without_rights")
def test_migrate_tells_a_database_that_refuses_from_one_that_is_away(
    tmp_path: Path, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    for reason, dsn in refusals(postgres_server).items():
        monkeypatch.setenv("DATABASE_URL", dsn)
        assert main(["migrate", "up", "--config", str(config)]) == 1
        printed = capsys.readouterr().err
        assert re.match(f"saga: the database refuses this server: {reason}", printed)
        assert "cannot be reached" not in printed
    monkeypatch.setenv("DATABASE_URL", f"postgresql://postgres@127.0.0.1:{free_port()}/saga")
    assert main(["migrate", "status", "--config", str(config)]) == 1
    assert capsys.readouterr().err.startswith("saga: the database cannot be reached: ")


def test_a_host_nobody_knows_is_waited_for_and_named_as_an_error(tmp_path: Path) -> None:
    dsn = "postgresql://postgres@no-such-host.invalid/saga"
    with server_process(tmp_path, {}, env={"DATABASE_URL": dsn}) as server:
        server.spawn()
        while "database_host_unknown" not in (server.log if (tmp_path / "server.log").exists() else ""):
            assert server.process.poll() is None, server.log
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert re.search(r'ERROR +saga\.server database_host_unknown host=no-such-host\.invalid hint="', server.log)


def test_the_first_line_says_what_the_server_is_about_to_run_on_without_its_secrets(
    tmp_path: Path, postgres_dsn: str
) -> None:
    dsn = postgres_dsn.replace("postgres@", "postgres:hidden-word@")
    with server_process(tmp_path, {}, env={"DATABASE_URL": dsn}) as server:
        server.start()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        at = urlsplit(postgres_dsn)
        first = server.log.splitlines()[0]
        assert re.search(rf"INFO +saga\.server starting version=\S+ python=\S+ pid={server.process.pid} ", first)
        assert f"workers=1 config={server.config} store=postgres:postgres@127.0.0.1:{at.port}{at.path} " in first
        assert first.endswith("workflow_dir=workflows")
        assert "hidden-word" not in server.log


def test_every_line_of_a_configuration_that_cannot_be_used_says_who_prints_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"server": {"port": "x"}, "saga": {"lease_secs": -1}, "nonsense": 1}))
    assert main(["serve", "--config", str(config)]) == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 3
    assert all(line.startswith(f"saga: {config}:1:") for line in printed)


@pytest.mark.parametrize("number", ["x", "0", "257", "1.5", "", "٣"])
def test_a_number_of_workers_that_is_none_is_refused_with_what_was_expected(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["serve", "--workers", number])
    assert exited.value.code == 2
    assert f"argument --workers: expected a number from 1 to 256, got {number}" in capsys.readouterr().err


def test_where_lines_are_json_so_is_the_reason_why_a_server_does_not_start(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    (reason, dsn), *_ = refusals(postgres_server).items()
    env = {"DATABASE_URL": dsn, "SAGA__OBSERVABILITY__LOG__FORMAT": "json"}
    with server_process(tmp_path, {}, env=env) as server:
        server.spawn()
        assert server.wait() == 1
        starting, refused = map(json.loads, server.log.splitlines())
        assert (starting["event"], refused["event"], refused["level"]) == ("starting", "cannot_start", "critical")
        assert refused["problem"].startswith(f"the database refuses this server: {reason}; see")
