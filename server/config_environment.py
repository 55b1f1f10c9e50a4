"""What the environment says, put into and over the nodes of the configuration file: `${VAR}`, `DATABASE_URL`,
`OTEL_EXPORTER_OTLP_ENDPOINT` and `SAGA__SECTION__KEY`. Whether there is such a key is seen when the nodes are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from saga.yaml_nodes import Faults, Fields, Items, Kind, Mark, Node, Refused, Scalar, cut, join, kind_of

OVERRIDE_PREFIX = "SAGA__"
OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own name for the collector's address."""
_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-[^}]*)?\}|\$\{")


def expand(node: Node, path: str, environ: Mapping[str, str], faults: Faults) -> Node:
    """The tree with variables put into its strings; `$${` stands for `${`.

    A value with a variable in it has the type its text has then, whether it stands in quotes or not: within braces YAML
    wants the quotes.
    """
    if isinstance(node, Fields):
        for key, (mark, value) in node.fields.items():
            node.fields[key] = (mark, expand(value, join(path, key), environ, faults))
    elif isinstance(node, Items):
        node.items = [expand(value, f"{path}[{index}]", environ, faults) for index, value in enumerate(node.items)]
    elif isinstance(node, Scalar) and "${" in node.text:
        found = [_variable(match, environ) for match in _VARIABLE.finditer(node.text)]
        missing = [one for one in found if isinstance(one, _NoValue)]
        for one in missing:
            faults.note(path, one.reason, one.message, node)
        if missing:
            return Refused(node.mark)
        following = iter(found)
        text = _VARIABLE.sub(lambda _: str(next(following)), node.text)
        return Scalar(text=text, plain=True, mark=node.mark, source=node.text)
    return node


class _NoValue(msgspec.Struct, frozen=True):
    reason: str
    message: str


def _variable(match: re.Match[str], environ: Mapping[str, str]) -> str | _NoValue:
    if match[0] == "$${":
        return "${"
    name, default = match["name"], match["default"]
    if name is None:
        return _NoValue("value", "expected ${NAME} or ${NAME:-default} ($${ stands for a plain ${)")
    value = environ.get(name)
    if default is not None and not value:
        return str(default).removeprefix(":-")
    if value is None:
        return _NoValue("missing", f"environment variable {name} is not set, and ${{{name}}} gives no default")
    return value


def overlay(root: Node, environ: Mapping[str, str], faults: Faults) -> Node:
    """The tree with `DATABASE_URL` and `OTEL_EXPORTER_OTLP_ENDPOINT` and then the overrides put over it."""
    if not isinstance(root, Fields):
        return root
    if environ.get("DATABASE_URL"):
        for key, text in _database_url(environ["DATABASE_URL"], faults):
            _put(root, ["database", key], text, "DATABASE_URL", faults)
    if environ.get(OTLP_VARIABLE):
        _put(root, ["observability", "otlp", "endpoint"], environ[OTLP_VARIABLE], OTLP_VARIABLE, faults)
    for name in sorted(environ):
        if name.startswith(OVERRIDE_PREFIX):
            keys = name.removeprefix(OVERRIDE_PREFIX).lower().split("__")
            if all(keys):
                _put(root, keys, environ[name], name, faults)
            else:
                mark = Mark(line=None, column=None, origin=name)
                faults.note("", "unknown_key", f"expected {OVERRIDE_PREFIX}SECTION__KEY", mark)
    return root


def _put(root: Fields, keys: list[str], text: str, origin: str, faults: Faults) -> None:
    """Sets one key, making the maps on the way. Whether there is such a key is seen when the tree is read."""
    mark = Mark(line=None, column=None, origin=origin)
    here, path = root, ""
    for word in keys[:-1]:
        key = _spelling(word, here)
        path = join(path, key)
        below = here.fields[key][1] if key in here.fields else None
        if below is None or (isinstance(below, Scalar) and kind_of(below) is Kind.NULL):
            below = Fields({}, mark)
            here.fields[key] = (mark, below)
        if isinstance(below, Refused):
            return
        if not isinstance(below, Fields):
            faults.note(path, "type", f"expected a map to set {keys[-1]} in", mark)
            return
        here = below
    key = _spelling(keys[-1], here)
    present = here.fields.get(key)
    if present is not None and isinstance(present[1], Fields):
        faults.note(join(path, key), "type", "is a section; an override sets one of its keys", mark)
        return
    here.fields[key] = (mark, Scalar(text=text, plain=True, mark=mark, source=f"the value of {origin}"))
    if key in ("password", "password_file"):
        # Both at once is a fault in a file; from outside, the one that is given replaces the other.
        here.fields.pop("password_file" if key == "password" else "password", None)


def _spelling(word: str, fields: Fields) -> str:
    """The key as the file spells it: variables have no lower case and no dashes (`services.stock-api`)."""
    for key in fields.fields:
        if key.lower().replace("-", "_") == word.replace("-", "_"):
            return key
    return word


def _database_url(url: str, faults: Faults) -> Iterator[tuple[str, str]]:
    """The keys of `database` that a URL sets. Its text is never shown: there may be a password in it."""

    def refuse(message: str) -> None:
        faults.note("database", "value", message, Mark(line=None, column=None, origin="DATABASE_URL"))

    try:
        parts = urlsplit(url)
        port = parts.port
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        refuse("expected postgresql://user:password@host:port/name?sslmode=..., got something else")
        return
    if parts.scheme not in ("postgres", "postgresql"):
        refuse("expected a URL that begins with postgresql:// or postgres://")
        return
    allowed = ("sslmode", "sslrootcert", "sslcert", "sslkey", "host", "port", "user", "password", "dbname")
    if unknown := sorted(set(query) - set(allowed)):
        refuse(f"unknown parameter {cut(unknown[0], 40)}; known: {', '.join(allowed)}")
    found = {
        "host": query.get("host") or unquote(parts.hostname or ""),
        "port": query.get("port") or ("" if port is None else str(port)),
        "name": query.get("dbname") or unquote(parts.path.removeprefix("/")),
        "user": query.get("user") or unquote(parts.username or ""),
        "password": query.get("password") or unquote(parts.password or ""),
        "ssl_mode": query.get("sslmode", ""),
        "ssl_root_cert": query.get("sslrootcert", ""),
        "ssl_cert": query.get("sslcert", ""),
        "ssl_key": query.get("sslkey", ""),
    }
    yield from ((key, text) for key, text in found.items() if text)
