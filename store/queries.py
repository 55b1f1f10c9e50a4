"""The queries of `sql/`, by name. The only place that makes a `Query`; the stores accept nothing else.

A file holds one subject. Each query opens with `-- name:` and `-- for:` (what it is good for), and, where the other
dialect has no query of that name, `-- only here:` with the reason. Parameters are written `:name`; values never become
part of the text. Migrations (`NNN_name.up.sql`) are read by `migrations.py`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from types import MappingProxyType

# Literals, quoted names and casts are matched first, so that a colon in them is not taken for a parameter.
_TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|::|:(?P<parameter>[a-z_][a-z0-9_]*)")
_HEADER = re.compile(r"^-- (?P<field>name|for|only here): (?P<value>.+)$")


class Dialect(enum.StrEnum):
    """The databases there are queries for; the value is the folder's name in `sql/`."""

    POSTGRES = "postgres"
    SQLITE = "sqlite"


@dataclass(frozen=True, slots=True)
class Query:
    """One statement. `text` is what the driver takes: `$1…` in the order of `parameters` for Postgres, `:name` for
    SQLite. `only_here`: why the other dialect has none of this name."""

    name: str
    purpose: str
    parameters: tuple[str, ...]
    text: str
    only_here: str | None = None


def folder(dialect: Dialect) -> Traversable:
    """Where the SQL of a dialect lies."""
    return resources.files("sql") / dialect.value


@cache
def load(dialect: Dialect) -> Mapping[str, Query]:
    """All queries of a dialect, by name. ValueError: a file breaks the form, or a name stands twice."""
    queries: dict[str, Query] = {}
    for file in sorted(folder(dialect).iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".sql") or file.name.endswith((".up.sql", ".down.sql")):
            continue
        for query in _parse(file.read_text(encoding="utf-8"), dialect, file.name):
            if query.name in queries:
                raise ValueError(f"{file.name}: query {query.name} exists already")
            queries[query.name] = query
    return MappingProxyType(queries)


def _parse(source: str, dialect: Dialect, file_name: str) -> list[Query]:
    blocks: list[tuple[dict[str, str], list[str]]] = []
    for line in source.splitlines():
        header = _HEADER.match(line)
        if header is not None and header["field"] == "name":
            blocks.append(({"name": header["value"]}, []))
        elif header is not None and blocks:
            blocks[-1][0][header["field"]] = header["value"]
        elif blocks and not line.startswith("--"):
            blocks[-1][1].append(line)
        elif line.strip() and not line.startswith("--"):
            raise ValueError(f"{file_name}: SQL before the first '-- name:'")
    queries = []
    for fields, lines in blocks:
        body = "\n".join(lines).strip().removesuffix(";")
        if not body or "for" not in fields:
            raise ValueError(f"{file_name}: query {fields['name']} lacks a statement or its '-- for:'")
        text, parameters = _bind(body, dialect)
        queries.append(Query(fields["name"], fields["for"], parameters, text, fields.get("only here")))
    return queries


def _bind(body: str, dialect: Dialect) -> tuple[str, tuple[str, ...]]:
    """The text for the driver, and the parameters in order of first use."""
    parameters: list[str] = []

    def place(match: re.Match[str]) -> str:
        name = match["parameter"]
        if name is None:
            return match[0]
        if name not in parameters:
            parameters.append(name)
        return f"${parameters.index(name) + 1}" if dialect is Dialect.POSTGRES else match[0]

    return _TOKEN.sub(place, body), tuple(parameters)
