"""The server as people run it: `saga serve` in a process of its own, on free ports, spoken to over its own API."""

from __future__ import annotations

import collections
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECS = 30.0

PORTS_OF_A_WORKER = 1500
"""Below 32000, where systems begin to take ports for connections: what is free stays so until it is used. Each worker
of a parallel run has a range of its own."""
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_numbers = itertools.cycle(range(20_000 + _worker * PORTS_OF_A_WORKER, 20_000 + (_worker + 1) * PORTS_OF_A_WORKER))
# Two runs at a time on one machine begin at different places.
collections.deque(itertools.islice(_numbers, os.getpid() % PORTS_OF_A_WORKER), maxlen=0)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, each another."""
    found: list[int] = []
    for port in itertools.islice(_numbers, PORTS_OF_A_WORKER):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no port is free")


def free_port() -> int:
    return free_ports(1)[0]


class ServerProcess:
    """A server with a configuration file of its own in `folder`. `log` is all it has written. `program`: what Python is
    to run, if it is not the command line as it is."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *arguments: str,
        env: Mapping[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "server.cli"),
    ):
        self.folder = folder
        self.bearer: str | None = None
        """The token that `call` sends, where its caller sends no other."""
        self.port, self.grpc_port = free_ports(2)
        self.config = folder / "config.yaml"
        # JSON is YAML.
        self.config.write_text(json.dumps({"server": {"port": self.port, "grpc_port": self.grpc_port}, **config}))
        self._arguments = arguments
        self._program = program
        # Lines that are read by tests; those about the form of lines ask for theirs.
        self._env = {**os.environ, "SAGA__OBSERVABILITY__LOG__FORMAT": "text", **(env or {})}
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def spawn(self) -> None:
        """Starts the process without waiting for anything."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._program, "serve", "--config", str(self.config), *self._arguments],
                cwd=self.folder,
                env={**self._env, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'proto'}"},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def start(self) -> None:
        """Returns when the server is ready."""
        self.spawn()
        self.until_ready()

    def until_ready(self) -> None:
        give_up_at = time.monotonic() + START_SECS
        while True:
            assert self.process.poll() is None, self.log
            try:
                if self.call("GET", "/readyz")[0] == 200:
                    return
            except OSError:
                pass
            assert time.monotonic() < give_up_at, self.log
            time.sleep(0.02)  # a process of its own: nothing to wait on but its answer

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and decoded body of a request."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if self.bearer is not None:
            request.add_header("Authorization", f"Bearer {self.bearer}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=70) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def register(self, workflow_yaml: str) -> None:
        status, answer = self.call("POST", "/api/v1/workflows", {"workflow_yaml": workflow_yaml})
        assert status == 201, answer

    def start_saga(self, workflow_name: str, payload: Mapping[str, Any]) -> str:
        """The id of a saga, durably started."""
        status, answer = self.call("POST", "/api/v1/sagas", {"workflow_name": workflow_name, "payload": payload})
        assert status == 201, answer
        saga_id: str = answer["saga_id"]
        return saga_id

    def ended(self, saga_id: str) -> dict[str, Any]:
        """The saga with its step logs, once it is terminal."""
        while True:
            status, answer = self.call("GET", f"/api/v1/sagas/{saga_id}?wait_secs=30")
            assert status == 200, answer
            if answer["saga"]["status"] in {"COMPLETED", "FAILED", "CANCELLED"}:
                found: dict[str, Any] = answer
                return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: nothing is said, nothing is finished."""
        self.process.kill()
        self.process.wait()

    def wait(self, secs: float = 30.0) -> int:
        """The exit status."""
        return self.process.wait(secs)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


@contextmanager
def server_process(
    folder: Path,
    config: Mapping[str, Any],
    *arguments: str,
    env: Mapping[str, str] | None = None,
    program: tuple[str, ...] = ("-m", "server.cli"),
) -> Iterator[ServerProcess]:
    """A server that is not started yet; it does not outlive the block."""
    server = ServerProcess(folder, config, *arguments, env=env, program=program)
    try:
        yield server
    finally:
        server.close()
