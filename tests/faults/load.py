"""Clients that start sagas, one after the other, whatever becomes of the server, and remember what they were told.

Each start has an idempotency key and is asked for again until it is answered 201. So when the load has ended, the sagas
in the store are those that were answered, not one more or less.
"""

from __future__ import annotations

import http.client
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.support.server_process import ServerProcess

PATIENCE_SECS = 60.0
NOTHING: Mapping[str, Any] = {}


class Load:
    """What the clients were told. `unexpected`: answers that are neither 201 nor an honest 503."""

    def __init__(
        self, servers: Sequence[ServerProcess], workflows: Sequence[str], in_turn: bool, more: Mapping[str, Any]
    ) -> None:
        self._servers = servers
        self._workflows = workflows
        self._in_turn = in_turn
        self._more = more
        self._name = uuid.uuid4().hex
        self._over = threading.Event()
        self._turn = threading.Lock()
        self._started = 0
        self._may_start = threading.Event()
        self._may_start.set()
        self._asking = 0
        self.answered: dict[str, str] = {}
        """Workflow by saga id."""
        self.refused = Counter[str]()
        """Error codes of 503."""
        self.unexpected: list[tuple[int, Any]] = []
        self.dropped = 0
        """Requests that were not answered at all."""

    def until_answered(self, more: int) -> None:
        """Returns when that many more starts have been answered."""
        count = len(self.answered)
        until(lambda: len(self.answered) >= count + more, *self._servers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody asks for a saga while the block lasts, and what was asked for before has been answered; the sagas go
        on."""
        with self._turn:
            self._may_start.clear()
        try:
            until(lambda: not self._asking, *self._servers)
            yield
        finally:
            self._may_start.set()

    def end(self) -> None:
        """No further saga; those that were asked for are asked for until they are answered."""
        self._over.set()

    def client(self) -> None:
        while not self._over.is_set():
            self._may_start.wait()
            with self._turn:
                if not self._may_start.is_set():
                    continue
                self._started += 1
                self._asking += 1
                number = self._started
            try:
                self._start(number)
            finally:
                with self._turn:
                    self._asking -= 1

    def _start(self, number: int) -> None:
        workflow = self._workflows[number % len(self._workflows)]
        body = {"workflow_name": workflow, "payload": {"order_id": f"o-{number}", "amount": number, **self._more}}
        give_up_at = time.monotonic() + PATIENCE_SECS
        tries = 0
        while True:
            server = self._servers[(number * self._in_turn + tries) % len(self._servers)]
            tries += 1
            try:
                status, answer = server.call("POST", "/api/v1/sagas", body, Idempotency_Key=f"{self._name}-{number}")
            except (OSError, http.client.HTTPException, ValueError):  # ValueError: an answer that was cut off
                self.dropped += 1
            else:
                if status == 201:
                    self.answered[answer["saga_id"]] = workflow
                    return
                if status == 503:
                    self.refused[answer["error"]["code"]] += 1
                else:
                    self.unexpected.append((status, answer))
            assert time.monotonic() < give_up_at, (number, dict(self.refused), self.unexpected)
            time.sleep(0.02)  # a client's own pause between tries


@contextmanager
def load(
    servers: Sequence[ServerProcess],
    workflows: Sequence[str],
    clients: int = 4,
    *,
    in_turn: bool = True,
    payload: Mapping[str, Any] = NOTHING,
) -> Iterator[Load]:
    """Starts sagas while the block lasts; behind it every start has been answered 201. `in_turn` False: each start is
    first asked of the first server, and of the next one only when that does not answer it. `payload`: what else each
    has in it."""
    made = Load(servers, workflows, in_turn, payload)
    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(made.client) for _ in range(clients)]
        try:
            yield made
        finally:
            made.end()
    for one in running:
        one.result()


def until(holds: Callable[[], bool], *servers: ServerProcess) -> None:
    """Waits for something that only other processes bring about."""
    give_up_at = time.monotonic() + PATIENCE_SECS
    while not holds():
        assert time.monotonic() < give_up_at, "\n".join(server.log[-4000:] for server in servers)
        time.sleep(0.01)  # foreign processes: nothing to wait on but what they show
