"""`docs/metrics.md` beside what a server prints: both directions, one process and several."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.scrape import Family, printed_by_a_server
from web.shared_metrics import OF_THE_STORE

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(
    r"\| `(?P<name>[a-z_]+)` \| (?P<kind>\w+) \|(?P<labels>[^|]*)\| (?P<meaning>\S[^|]*) \| (?P<advice>\S[^|]*) \|"
)


def documented() -> dict[str, tuple[str, frozenset[str], str]]:
    """Type, labels and meaning of each metric."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    rows = [match for line in lines if (match := ROW.fullmatch(line))]
    assert len(rows) == len(lines), [line for line in lines if not ROW.fullmatch(line)]
    found = {
        row["name"]: (row["kind"], frozenset(re.findall(r"`(\w+)`", row["labels"])), row["meaning"]) for row in rows
    }
    assert len(found) == len(rows)
    return found


def told(printed: dict[str, Family], kept_out: frozenset[str] = frozenset()) -> dict[str, tuple[str, frozenset[str]]]:
    return {name: (family.kind, family.own_labels - kept_out) for name, family in printed.items()}


def written() -> dict[str, tuple[str, frozenset[str]]]:
    return {name: (kind, labels) for name, (kind, labels, _) in documented().items()}


def test_the_document_names_what_one_process_prints_with_type_and_labels(tmp_path: Path) -> None:
    assert told(printed_by_a_server(tmp_path)) == written()


def test_the_document_names_what_several_workers_print_and_what_of_it_is_told_once(
    tmp_path: Path, postgres_dsn: str
) -> None:
    printed = printed_by_a_server(tmp_path, "--workers", "2", env={"DATABASE_URL": postgres_dsn})
    assert told(printed, frozenset({"worker"})) == written()
    once = {name for name, family in printed.items() if "worker" not in family.own_labels}
    assert once == {name for name, (_, _, meaning) in documented().items() if meaning.startswith("*store*")}
    assert once == OF_THE_STORE


def test_metrics_are_named_as_prometheus_names_them() -> None:
    for name, (kind, labels) in written().items():
        assert (kind == "counter") == name.endswith("_total"), name
        assert not labels & {"le", "quantile", "job", "instance", "worker"}, name
        assert not re.search(r"_(ms|millis|secs|minutes|kb|mb|count|sum|bucket)$", name), name
        assert ("_duration" in name) == name.endswith("_duration_seconds"), name
