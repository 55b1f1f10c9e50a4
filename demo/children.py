"""The processes of the demo: started, watched, and gone when the demo is gone, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

READY_SECS = 60.0
"""Far above what a start takes (about a second); a slow machine under load must not fail the demo."""

STOP_SECS = 10.0
"""Above the server's own grace for running attempts; what is left then is killed."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ChildFailed(Exception):
    """A process ended, or did not get ready. The text ends with the last lines of its log."""


class Child:
    """One process. What it prints to stderr, and without `calls` to stdout too, is kept in a log of its own."""

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, env: Mapping[str, str], calls: Path | None = None
    ) -> None:
        self.name = name
        self._log = log
        self._started = time.monotonic()
        with log.open("ab") as own, (calls or log).open("ab") as out:
            # A session of its own: Ctrl-C in the terminal reaches the demo alone, which then stops all in order.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=own,
                env=dict(env),
                start_new_session=True,
                preexec_fn=_dying_with(os.getpid()),
            )

    def wait_until(self, is_ready: Callable[[], bool]) -> float:
        """Seconds from the start until `is_ready`. `ChildFailed`: it ended first, or time is up."""
        while not is_ready():
            self.check()
            if time.monotonic() - self._started > READY_SECS:
                raise ChildFailed(f"{self.name} was not ready within {READY_SECS:g} s{self._last_lines()}")
            time.sleep(0.02)
        return time.monotonic() - self._started

    def check(self) -> None:
        """`ChildFailed`: the process has ended."""
        status = self._process.poll()
        if status is not None:
            how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
            raise ChildFailed(f"{self.name} ended with {how}{self._last_lines()}")

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def wait_until_gone(self) -> None:
        try:
            self._process.wait(STOP_SECS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_lines(self, count: int = 12) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-count:]
        return "".join(f"\n    {line}" for line in lines) or " and printed nothing"


def _dying_with(parent: int) -> Callable[[], None] | None:
    """For the child, before it runs its program: the kernel ends it when `parent` dies, even by SIGKILL (Linux only).

    Safe here because the demo has no threads.
    """
    if _libc is None:
        return None
    prctl = _libc.prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # it died before the kernel was told

    return arrange


def pick_port(usual: int) -> int:
    """`usual` if nothing listens there, else any free port."""
    for port in (usual, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as probe:
                chosen: int = probe.getsockname()[1]
                return chosen
        except OSError:
            continue
    raise ChildFailed("no free port on 127.0.0.1")
