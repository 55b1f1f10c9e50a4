"""The arrows between the folders, read from the imports themselves, and the picture of the house in the docs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ARROWS: dict[str, set[str]] = {
    "saga": set(),
    "bridge": set(),
    "sql": set(),
    "workflows": set(),
    "store": {"saga", "bridge", "sql"},
    "rpc": {"saga", "bridge", "proto"},
    "web": {"saga"},
    "server": {"saga", "bridge", "store", "rpc", "web", "sql", "workflows", "proto", "demo"},
}
"""What each folder may import of the others. `demo/` and `bench/` stand outside the house and may import anything; of
the house only the command line (`saga demo`) imports one of them. `proto` is the generated code (`k1s0`)."""

OUTSIDE = {"demo", "bench", "tests"}
OURS = {*ARROWS, *OUTSIDE, "proto"}

FOREIGN_TO_SAGA = {
    "aiokafka",
    "asyncio",
    "asyncpg",
    "google",
    "grpc",
    "grpclib",
    "h2",
    "hypercorn",
    "prometheus_client",
    "quart",
    "quart_trio",
    "sqlite3",
    "trio_asyncio",
}
"""Databases, networks, frameworks and the other event loop: the domain knows none of them."""

PURE = [
    "access",
    "errors",
    "expressions",
    "facts",
    "mapping",
    "model",
    "tracing",
    "transitions",
    "workflow",
    "workflow_yaml",
    "yaml_fields",
    "yaml_nodes",
]
"""Modules of `saga/` that decide: no waiting, no clock, no chance, no file but the one they are told to read."""

IMPURE = {"trio", "time", "random", "secrets", "socket", "threading", "uuid"}


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Every imported module with its line, wherever in the file it is imported; also for type checkers only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            first = node.args[0] if node.args else None
            yield node.lineno, first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "?"


def folder_of(module: str) -> str:
    top = module.partition(".")[0]
    return "proto" if top == "k1s0" else top


def forbidden(folder: str, source: str) -> list[str]:
    """The imports of a file in that folder which point where they may not."""
    found = []
    for line, module in imports_of(source):
        to = folder_of(module)
        if to in OURS and to != folder and to not in ARROWS[folder]:
            found.append(f"line {line}: {folder} -> {to} ({module})")
        if folder == "saga" and to in FOREIGN_TO_SAGA:
            found.append(f"line {line}: saga -> {module}")
        if module == "?":
            found.append(f"line {line}: an import that cannot be read")
    return found


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_point_inward(folder: str) -> None:
    files = files_of(folder)
    assert files, f"{folder}/ has no modules"
    found = {
        str(file.relative_to(ROOT)): wrong for file in files if (wrong := forbidden(folder, file.read_text("utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize("module", PURE)
def test_what_decides_does_not_wait_read_a_clock_or_throw_dice(module: str) -> None:
    source = (ROOT / "saga" / f"{module}.py").read_text("utf-8")
    found = [f"line {line}: {name}" for line, name in imports_of(source) if folder_of(name) in IMPURE]
    calls = [
        f"line {node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and re.fullmatch(r"(.*\.)?(now|utcnow|today)", ast.unparse(node.func))
    ]
    waits = [
        f"line {node.lineno}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AsyncFunctionDef | ast.Await)
    ]
    assert (found, calls, waits) == ([], [], [])


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("saga", "import store.sqlite"),
        ("saga", "from bridge import open_loop"),
        ("saga", "import asyncio"),
        ("saga", "from google.protobuf import json_format"),
        ("saga", "from k1s0.system.saga.v1 import saga_pb2"),
        ("store", "from rpc.caller import Caller"),
        ("web", "from store.sqlite import open_sqlite"),
        ("web", "import rpc"),
        ("rpc", "def f():\n    import web"),
        ("bridge", "from saga.errors import SagaError"),
        ("server", "import bench.engine"),
        ("store", "import importlib\nimportlib.import_module('web')"),
    ],
)
def test_the_check_sees_an_arrow_that_points_outward(folder: str, line: str) -> None:
    assert forbidden(folder, line)


def test_every_folder_with_modules_has_its_arrows() -> None:
    hidden_or_generated = {"proto", "build"}
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and any(path.glob("*.py"))
    }
    assert folders - hidden_or_generated == OURS - {"proto"}


# --- the picture -----------------------------------------------------------------------------------------------------

PICTURED = ["saga", "store", "rpc", "web", "server", "bridge"]
PICTURE = ROOT / "docs" / "architecture.md"


def pictured() -> dict[str, set[str]]:
    """Folder to the modules named under it, from the fenced tree of `docs/architecture.md`.

    A line that begins with `name/` opens a folder; indented below it, `name.py` stands for a module, several on a line
    and in what is said of them too.
    """
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", PICTURE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if re.search(r"^saga/", block, flags=re.MULTILINE)]
    assert len(trees) == 1, "docs/architecture.md has one tree of the house"
    folders: dict[str, set[str]] = {}
    modules: set[str] = set()
    for line in trees[0].splitlines():
        if opened := re.match(r"([a-z0-9_]+)/", line):
            modules = folders.setdefault(opened[1], set())
        modules.update(re.findall(r"\b([a-z0-9_]+)\.py\b", line))
    return folders


def test_the_picture_shows_every_folder_of_the_house() -> None:
    shown = set(pictured())
    assert {*ARROWS, "proto", "demo", "bench", "tests"} <= shown
    assert [name for name in sorted(shown) if not (ROOT / name).is_dir()] == []


@pytest.mark.parametrize("folder", PICTURED)
def test_the_picture_shows_every_module_and_none_that_is_gone(folder: str) -> None:
    there = {file.stem for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"}
    assert pictured().get(folder, set()) == there
