"""The SQL files: both dialects say the same, and everything in them is used."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import store
from saga.audit import AuditAction, AuditOutcome, Door
from saga.model import EventType, SagaStatus, StepAction, StepStatus
from store.migrations import FILE_NAME, migrations
from store.queries import Dialect, _parse, folder, load

POSTGRES = load(Dialect.POSTGRES)
SQLITE = load(Dialect.SQLITE)
SOURCES = {path.name: path.read_text() for path in Path(store.__file__).parent.glob("*.py")}


def test_a_query_of_both_dialects_has_the_same_parameters_in_both() -> None:
    for name in POSTGRES.keys() & SQLITE.keys():
        assert set(POSTGRES[name].parameters) == set(SQLITE[name].parameters), name


def test_a_query_of_one_dialect_says_why_and_one_of_both_does_not() -> None:
    for name in POSTGRES.keys() | SQLITE.keys():
        both = name in POSTGRES and name in SQLITE
        for queries in (POSTGRES, SQLITE):
            if name in queries:
                assert (queries[name].only_here is None) == both, name


def test_every_query_is_used_and_every_name_that_is_used_is_a_query() -> None:
    used = set(re.findall(r'(?:_Q|_QUERIES)\["(\w+)"\]', "\n".join(SOURCES.values())))
    assert used == set(POSTGRES) | set(SQLITE)


def test_only_the_loader_makes_queries() -> None:
    makers = {name for name, source in SOURCES.items() if re.search(r"\bQuery\(", source)}
    assert makers == {"queries.py"}


def test_parameters_are_found_outside_literals_casts_and_comments() -> None:
    source = "-- name: odd\n-- for: a test, says :not_this.\nSELECT ':nor' || :a::text, \":nor\", :b -- tail\n, :a;\n"
    (postgres,) = _parse(source.replace(" -- tail", ""), Dialect.POSTGRES, "odd.sql")
    assert postgres.parameters == ("a", "b")
    assert postgres.text == "SELECT ':nor' || $1::text, \":nor\", $2\n, $1"


@pytest.mark.parametrize("source", ["SELECT 1;", "-- name: a\n-- for: x\n", "-- name: a\nSELECT 1;"])
def test_a_file_without_the_form_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"odd\.sql"):
        _parse(source, Dialect.SQLITE, "odd.sql")


def words_of_check(schema: str, constraint: str) -> set[str]:
    match = re.search(rf"CONSTRAINT {constraint}\s+CHECK \(\w+ IN \(([^)]*)\)", schema)
    assert match is not None, constraint
    return set(re.findall(r"'(\w+)'", match[1]))


@pytest.mark.parametrize("dialect", Dialect)
def test_the_checks_of_the_tables_list_the_words_of_the_model(dialect: Dialect) -> None:
    schema = "\n".join(migration.up for migration in migrations(dialect))
    assert words_of_check(schema, "saga_states_status_check") == set(SagaStatus)
    assert words_of_check(schema, "saga_step_logs_action_check") == set(StepAction)
    assert words_of_check(schema, "saga_step_logs_status_check") == set(StepStatus)
    assert words_of_check(schema, "outbox_event_type_check") == set(EventType)
    assert words_of_check(schema, "outbox_status_check") == set(SagaStatus)
    assert words_of_check(schema, "audit_log_action_check") == set(AuditAction)
    assert words_of_check(schema, "audit_log_outcome_check") == set(AuditOutcome)
    assert words_of_check(schema, "audit_log_door_check") == set(Door)


def test_both_dialects_have_the_same_migrations_by_number_and_name() -> None:
    assert [(one.number, one.name) for one in migrations(Dialect.POSTGRES)] == [
        (one.number, one.name) for one in migrations(Dialect.SQLITE)
    ]


@pytest.mark.parametrize("dialect", Dialect)
def test_every_file_is_a_query_file_or_a_migration_with_both_halves(dialect: Dialect) -> None:
    names = {entry.name for entry in folder(dialect).iterdir()}
    for name in names:
        assert FILE_NAME.fullmatch(name) or re.fullmatch(r"[a-z_]+\.sql", name), name
        if name.endswith(".up.sql"):
            assert name.replace(".up.", ".down.") in names
            statements = [
                line for line in (folder(dialect) / name).read_text().splitlines() if line[:2] not in ("", "--")
            ]
            # A number may have nothing to do on one of the two databases.
            assert not any(statement.startswith("DROP") for statement in statements[:1]), name


@pytest.mark.parametrize("dialect", Dialect)
def test_every_index_says_whom_it_serves(dialect: Dialect) -> None:
    for migration in migrations(dialect):
        lines = migration.up.splitlines()
        for before, line in itertools.pairwise(lines):
            if line.startswith(("CREATE INDEX", "CREATE UNIQUE INDEX")):
                assert before.startswith("-- "), line
