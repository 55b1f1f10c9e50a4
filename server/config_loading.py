"""Reads the configuration: a YAML file, the environment, and defaults; every error at once.

In order, the later one wins: built-in defaults, the file, `DATABASE_URL` and `OTEL_EXPORTER_OTLP_ENDPOINT`,
`SAGA__SECTION__KEY`. Relative paths in it are relative to the current directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from saga.yaml_nodes import Fault, Faults, Fields, Mark, Node, read_nodes
from server.config import Config, ConfigInvalid
from server.config_environment import expand, overlay
from server.config_sections import read_config

DEFAULT_PATH = Path("config/config.yaml")
MAX_FILE_BYTES = 1024 * 1024


def load_config(path: Path | None, environ: Mapping[str, str]) -> Config:
    """The configuration; `ConfigInvalid` with every error at once.

    The file is `path` (`--config`), else the one `CONFIG_PATH` names, else `config/config.yaml` if there is one; with
    none of them the built-in defaults hold. `environ` is where `${VAR}`, `SAGA__...` and `DATABASE_URL` are looked up.
    """
    source = config_file(path, environ)
    faults = Faults()
    root: Node | None = Fields({}, Mark(line=None, column=None))
    content = b""
    if source is not None:
        content = _read(source)
        root = read_nodes(content, faults, max_bytes=MAX_FILE_BYTES)
        only_comments = [fault.reason for fault in faults.in_order()] == ["empty"]
        if only_comments:
            faults, root = Faults(), Fields({}, Mark(line=1, column=1))
    config = None
    if root is not None:
        root = overlay(expand(root, "", environ, faults), environ, faults)
        config = read_config(root, source, faults)
    if faults or config is None:
        raise ConfigInvalid(tuple(_line(source, fault) + _hint(content, fault) for fault in faults.in_order()))
    return config


def config_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file `load_config` reads; None: there is none."""
    if path is not None:
        return path
    if environ.get("CONFIG_PATH"):
        return Path(environ["CONFIG_PATH"])
    return DEFAULT_PATH if DEFAULT_PATH.exists() else None


def _read(source: Path) -> bytes:
    try:
        with source.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigInvalid((f"{source}: cannot be read: {error.strerror or error}",)) from error


def _line(source: Path | None, fault: Fault) -> str:
    if fault.origin is not None:
        place = f"{fault.origin}: "
    elif source is not None:
        place = f"{source}:{fault.line}:{fault.column}: " if fault.line is not None else f"{source}: "
    else:
        place = ""
    return f"{place}{fault.path}: {fault.message}" if fault.path else f"{place}{fault.message}"


def _hint(content: bytes, fault: Fault) -> str:
    """What to do about a variable within braces: YAML stops at the brace after its `$`, and knows of no variables."""
    if fault.reason != "syntax" or fault.line is None or fault.column is None:
        return ""
    lines = content.decode(errors="replace").splitlines()[fault.line - 1 : fault.line]  # none: the text ends too early
    read = "".join(lines)[: fault.column]
    return "; within { } and [ ] put ${...} in quotes" if read.endswith("${") else ""
