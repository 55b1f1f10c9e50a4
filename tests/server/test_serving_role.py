"""The role of docs/semantics.md that serves and cannot rewrite the audit log: its very statements, on a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.support.participants import participant
from tests.support.postgres import PostgresServer, ask
from tests.support.server_process import ROOT, server_process

ROLE = "saga_server"
WORKFLOW = """
name: order
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
"""


@pytest.fixture
def serving_dsn(postgres_server: PostgresServer, postgres_dsn: str) -> Iterator[str]:
    """The database of `postgres_dsn`, as the role of the document finds it."""
    (statements,) = re.findall(r"```sql\n(CREATE ROLE.*?)```", (ROOT / "docs/semantics.md").read_text(), re.S)
    database = postgres_dsn.rpartition("/")[2]
    postgres_server.execute(statements, database=database)
    try:
        yield postgres_dsn.replace("postgres@", f"{ROLE}@")
    finally:
        postgres_server.execute(f"DROP OWNED BY {ROLE}", database=database)
        postgres_server.execute(f"DROP ROLE {ROLE}")


def test_a_server_that_may_not_rewrite_the_audit_log_serves(
    tmp_path: Path, postgres_dsn: str, serving_dsn: str
) -> None:
    with participant() as shop:
        config = {"services": {"shop": shop.settings()}, "saga": {"retention_days": 1e-9}}
        with server_process(tmp_path, config, env={"DATABASE_URL": serving_dsn}) as server:
            server.start()
            server.register(WORKFLOW)
            saga_id = server.start_saga("order", {})
            assert server.ended(saga_id)["saga"]["status"] == "COMPLETED"
            for statement in (
                "UPDATE saga.audit_log SET principal = 'mallory'",
                "DELETE FROM saga.audit_log",
                "TRUNCATE saga.audit_log",
                "ALTER TABLE saga.audit_log DISABLE TRIGGER ALL",
                "DELETE FROM saga.schema_migrations",
                "CREATE TABLE saga.more (id int)",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    ask(serving_dsn, statement)
            status, log = server.call("GET", "/api/v1/audit")
            assert status == 200
            assert [entry["action"] for entry in log["entries"]] == ["START_SAGA", "REGISTER_WORKFLOW"]
            assert "permission denied" not in server.log.lower()
