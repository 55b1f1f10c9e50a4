"""How the demo shows a saga: one line a step, what was done on the left and its undo on the right."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

_COLOURS = {
    "SUCCESS": "32",
    "COMPLETED": "32",
    "FAILED": "31",
    "TIMEOUT": "31",
    "CANCELLED": "33",
    "SKIPPED": "33",
}
_WIDTH = 98


def uses_colour() -> bool:
    """Only on a terminal that can, and never under NO_COLOR."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, word: str) -> str:
    """`text` in the colour of the status `word`, where colours are used."""
    colour = _COLOURS.get(word)
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and uses_colour() else text


def timeline(steps: Sequence[str], logs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the table. `logs` as REST gives them, oldest first; of an action run twice the last counts."""
    by_action = {(log["step_index"], log["action"]): log for log in logs}
    name_width = max(len("step"), *(len(step) for step in steps))
    left, right = (f"{action:<10} {'attempts':>8} {'ms':>6}" for action in ("EXECUTE", "COMPENSATE"))
    yield f"  {'step':<{name_width}}   {left}   {right}".rstrip()
    for index, step in enumerate(steps):
        done, undone = by_action.get((index, "EXECUTE")), by_action.get((index, "COMPENSATE"))
        cells = f"{_cells(done, 'not called')}   {_cells(undone, '')}".rstrip()
        yield f"  {step:<{name_width}}   {cells}"
        for log in (done, undone):
            if log is not None and log["error_message"]:
                yield _cut(f"  {'':<{name_width}}   {log['error_message']}")


def elapsed_ms(started: str, ended: str) -> int:
    """Milliseconds between two instants as REST writes them."""
    return round((datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds() * 1000)


def _cells(log: Mapping[str, Any] | None, nothing: str) -> str:
    if log is None:
        return f"{nothing:<26}"
    ended = log["completed_at"]
    ms = elapsed_ms(log["started_at"], ended) if ended else ""
    return f"{painted(format(log['status'], '<10'), log['status'])} {log['attempts']:>8} {ms:>6}"


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"
