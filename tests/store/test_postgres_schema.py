"""The catalogue of a migrated database against the tables of the design."""

from __future__ import annotations

import asyncpg
import pytest

from tests.support.postgres import ask

# Column, type, NOT NULL, default: as the design's table has them. Columns beyond it are ours.
DESIGN = {
    "saga_states": [
        ("id", "uuid", True, "gen_random_uuid()"),
        ("workflow_name", "character varying(255)", True, None),
        ("current_step", "integer", True, "0"),
        ("status", "character varying(50)", True, "'STARTED'::character varying"),
        ("payload", "jsonb", False, None),
        ("correlation_id", "character varying(255)", False, None),
        ("initiated_by", "character varying(255)", False, None),
        ("error_message", "text", False, None),
        ("created_at", "timestamp with time zone", True, "now()"),
        ("updated_at", "timestamp with time zone", True, "now()"),
    ],
    "saga_step_logs": [
        ("id", "uuid", True, "gen_random_uuid()"),
        ("saga_id", "uuid", True, None),
        ("step_index", "integer", True, None),
        ("step_name", "character varying(255)", True, None),
        ("action", "character varying(50)", True, None),
        ("status", "character varying(50)", True, None),
        ("request_payload", "jsonb", False, None),
        ("response_payload", "jsonb", False, None),
        ("error_message", "text", False, None),
        ("started_at", "timestamp with time zone", True, "now()"),
        ("completed_at", "timestamp with time zone", False, None),
    ],
}

DESIGN_INDEXES = {
    "idx_saga_states_workflow_name": "saga.saga_states USING btree (workflow_name)",
    "idx_saga_states_status": "saga.saga_states USING btree (status)",
    "idx_saga_states_correlation_id": (
        "saga.saga_states USING btree (correlation_id) WHERE (correlation_id IS NOT NULL)"
    ),
    "idx_saga_states_created_at": "saga.saga_states USING btree (created_at)",
    "idx_saga_step_logs_saga_id_step_index": "saga.saga_step_logs USING btree (saga_id, step_index)",
}


@pytest.mark.parametrize("table", DESIGN)
def test_the_columns_of_the_design_are_there_to_the_letter_and_first(postgres_dsn: str, table: str) -> None:
    columns = ask(
        postgres_dsn,
        """
        SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = ('saga.' || $1)::regclass AND a.attnum > 0
        ORDER BY a.attnum
        """,
        table,
    )
    assert columns[: len(DESIGN[table])] == DESIGN[table]


def test_the_indexes_of_the_design_are_there_by_name(postgres_dsn: str) -> None:
    found = dict(ask(postgres_dsn, "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'saga'"))
    for name, definition in DESIGN_INDEXES.items():
        assert found[name] == f"CREATE INDEX {name} ON {definition}"


def test_the_keys_and_checks_of_the_design_are_there(postgres_dsn: str) -> None:
    found = {
        definition
        for (definition,) in ask(
            postgres_dsn,
            "SELECT conrelid::regclass || ': ' || pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'saga'::regnamespace",
        )
    }
    assert "saga.saga_states: PRIMARY KEY (id)" in found
    assert "saga.saga_step_logs: PRIMARY KEY (id)" in found
    assert "saga.saga_step_logs: FOREIGN KEY (saga_id) REFERENCES saga.saga_states(id) ON DELETE CASCADE" in found


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, status) VALUES ('a', 1, 'PAUSED')",
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, idempotency_key) VALUES ('a', 1, 'k')",
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, current_step) VALUES ('a', 1, -1)",
    ],
)
def test_the_tables_refuse_what_the_model_does_not_know(postgres_dsn: str, statement: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        ask(postgres_dsn, statement)


def test_updated_at_moves_by_itself_with_every_update(postgres_dsn: str) -> None:
    ask(
        postgres_dsn,
        "INSERT INTO saga.saga_states (workflow_name, workflow_version, updated_at) VALUES ('a', 1, '2000-01-01')",
    )
    ask(postgres_dsn, "UPDATE saga.saga_states SET current_step = 1, updated_at = '2000-01-01'")
    assert ask(postgres_dsn, "SELECT updated_at > now() - interval '1 minute' FROM saga.saga_states") == [(True,)]
