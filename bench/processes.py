"""The processes of a measurement: the participant, and programs that print what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def participant() -> Iterator[int]:
    """The port of a participant in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.participant"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def measured(module: str, *arguments: object) -> dict[str, Any]:
    """What a measuring process printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
