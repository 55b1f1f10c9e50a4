"""What a query reads: PostgreSQL's plan as it was carried out, and SQLite's own steps, counted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The nodes of one of PostgreSQL's plans, from the top."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def rows_read(node: dict[str, Any]) -> int:
    """How many rows a node of an analysed plan looked at, those it left out included."""
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return int((node["Actual Rows"] + removed) * node["Actual Loops"])


def hundreds_of_steps(connection: sqlite3.Connection, text: str, values: Mapping[str, object]) -> int:
    """How many hundreds of its own steps SQLite takes for a query that finds nothing."""
    hundreds = 0

    def count() -> int:
        nonlocal hundreds
        hundreds += 1
        return 0

    connection.set_progress_handler(count, 100)
    assert connection.execute(text, values).fetchall() == []
    connection.set_progress_handler(None, 0)
    return hundreds
