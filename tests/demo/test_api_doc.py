"""The session of docs/api.md, typed in again: every example gives the answer that stands below it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
# A command goes on in the next line after a backslash, or while its quote is open.
EXAMPLE = re.compile(r"^```console\n\$ (curl (?:[^'\n\\]|\\\n|'[^']*')*)\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
NUMBER = re.compile(r'(?<="id": ")\d+')
"""Of an audit entry: those of the demo's own orders came before."""
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where the demo's server answers, once its own orders have ended."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "demo"], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    assert demo.stdout is not None
    shown = ""
    for line in demo.stdout:
        shown += line
        if line.startswith("Ctrl-C stops"):
            break
    try:
        (found,) = re.findall(r"^REST +http://127\.0\.0\.1:(\d+)/", shown, re.MULTILINE)
        yield int(found)
    finally:
        demo.terminate()
        demo.communicate()


def parts(answer: str) -> list[str]:
    """Its lines of headers but the date, and its JSON on one line."""
    head, _, body = answer.replace("\r", "").rpartition("\n\n")
    headers = [line.strip() for line in head.splitlines() if not line.startswith("date:")]
    return [*headers, NUMBER.sub("NUMBER", INSTANT.sub("INSTANT", json.dumps(json.loads(body))))]


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are curl commands")
def test_every_example_gives_the_answer_that_is_shown(port: int) -> None:
    examples = EXAMPLE.findall(API)
    assert len(examples) == API.count("\n$ curl ")
    ids: dict[str, str] = {}
    for command, answer in examples:
        for shown, ours in ids.items():
            command = command.replace(shown, ours)
        done = subprocess.run(
            ["sh", "-c", command.replace("127.0.0.1:8080", f"127.0.0.1:{port}")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for shown, ours in zip(ID.findall(answer), ID.findall(done.stdout), strict=True):
            ids.setdefault(shown, ours)
        expected = ID.sub(lambda match: ids[match[0]], answer)
        assert parts(done.stdout) == parts(expected), command
