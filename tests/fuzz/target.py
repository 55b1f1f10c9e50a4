"""The server process that is fuzzed: what it has logged, and how large it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.server_process import ServerProcess, server_process

GROWTH_BYTES = 64 * 1024 * 1024
"""What a server may grow by while it is warm. Ten thousand leaks of a request of some KiB are more."""


class Target:
    """One server, ready."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self.port, self.grpc_port = server.port, server.grpc_port

    def rss(self) -> int:
        """The bytes of memory it has; 0 where the system does not say."""
        status = Path(f"/proc/{self._server.process.pid}/status")
        if not status.exists():
            return 0
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        assert found, "it has ended"
        return int(found[1]) * 1024

    def check(self) -> None:
        """It lives, answers, and has logged no error of its own."""
        assert self._server.process.poll() is None, self._server.log[-5000:]
        assert self._server.call("GET", "/readyz")[0] == 200
        # What a participant does not undo is told as an error, and is none of ours.
        log = "\n".join(line for line in self._server.log.splitlines() if " compensation_failed " not in line)
        for sign in ("Traceback", " ERROR ", "code=INTERNAL", "code=UNKNOWN", "status=500"):
            at = log.find(sign)
            assert at < 0, log[max(0, at - 500) : at + 3000]


@contextmanager
def target(folder: Path) -> Iterator[Target]:
    config = {"saga": {"data_dir": ":memory:"}, "services": {"shop": {"host": "127.0.0.1", "port": 1}}}
    with server_process(folder, config) as server:
        server.start()
        yield Target(server)
