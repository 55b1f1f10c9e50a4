"""The server process that is fuzzed: what it has logged, and how large it is."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.certificates import Certificate, certificate, client_context
from tests.support.server_process import ServerProcess, server_process

GROWTH_BYTES = 64 * 1024 * 1024
"""What a server may grow by while it is warm. Ten thousand leaks of a request of some KiB are more."""


GROWTH_WARM_BYTES = 16 * 1024 * 1024
"""What it may grow by over the second half of as many requests as the first."""

READY_SECS = 30.0


class Target:
    """One server, ready. `made`: the certificate it shows; without one it speaks no TLS."""

    def __init__(self, server: ServerProcess, made: Certificate | None = None) -> None:
        self._server = server
        self._made = made
        self.port, self.grpc_port = server.port, server.grpc_port

    def trusting(self, protocol: str) -> ssl.SSLContext:
        """For a client that speaks `protocol`."""
        assert self._made is not None
        return client_context(self._made.ca_file, protocol)

    def until_ready(self) -> None:
        give_up_at = time.monotonic() + READY_SECS
        while not self._is_ready():
            assert self._server.process.poll() is None, self._server.log
            assert time.monotonic() < give_up_at, self._server.log
            time.sleep(0.02)  # a process of its own: nothing to wait on but its answer

    def _is_ready(self) -> bool:
        verify: ssl.SSLContext | bool = False if self._made is None else self.trusting("http/1.1")
        try:
            scheme = "http" if self._made is None else "https"
            return httpx.get(f"{scheme}://localhost:{self.port}/readyz", verify=verify, timeout=20).status_code == 200
        except httpx.TransportError:
            return False

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
        assert self._is_ready()
        # What a participant does not undo is told as an error, and is none of ours.
        log = "\n".join(line for line in self._server.log.splitlines() if " compensation_failed " not in line)
        for sign in ("Traceback", " ERROR ", "code=INTERNAL", "code=UNKNOWN", "status=500"):
            at = log.find(sign)
            assert at < 0, log[max(0, at - 500) : at + 3000]


@contextmanager
def target(folder: Path, *, tls: bool = False) -> Iterator[Target]:
    config = {"saga": {"data_dir": ":memory:"}, "services": {"shop": {"host": "127.0.0.1", "port": 1}}}
    made = certificate(folder, called="target") if tls else None
    env = {}
    if made is not None:
        env = {"SAGA__SERVER__TLS__CERT_FILE": made.cert_file, "SAGA__SERVER__TLS__KEY_FILE": made.key_file}
    # Insecure: what is sent under other names is to come as far as the rest.
    with server_process(folder, config, "--insecure", env=env) as server:
        server.spawn()
        ready = Target(server, made)
        ready.until_ready()
        yield ready
