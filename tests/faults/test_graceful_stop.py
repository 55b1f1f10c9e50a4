"""SIGTERM: a worker says that it goes, finishes what is on its way and leaves the rest to others, at once.

Two real servers on one Postgres. The lease is long: nothing here waits for one to end.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.load import until
from tests.faults.test_kill import GOOD, check_ledger
from tests.support.participants import Participant, Script, participant
from tests.support.postgres import ask
from tests.support.server_process import ServerProcess, server_process

SAGAS = 5


@contextmanager
def two_servers(
    folder: Path, dsn: str, script: Script, grace_secs: float
) -> Iterator[tuple[ServerProcess, ServerProcess, Participant]]:
    with participant(flavour="grpcio", script=script) as shop:
        config = {
            "services": {"shop": shop.settings()},
            "saga": {"lease_secs": 300.0, "shutdown_grace_secs": grace_secs},
        }
        (folder / "first").mkdir()
        (folder / "second").mkdir()
        with (
            server_process(folder / "first", config, env={"DATABASE_URL": dsn}) as first,
            server_process(folder / "second", config, env={"DATABASE_URL": dsn}) as second,
        ):
            first.start()
            second.start()
            first.register(GOOD)
            yield first, second, shop


def readiness(server: ServerProcess) -> tuple[int, str]:
    status, answer = server.call("GET", "/readyz")
    return status, answer["checks"]["worker"]


def post(server: ServerProcess, body: dict[str, Any]) -> tuple[socket.socket, bytes]:
    """A start request of which the last bytes are still to be sent."""
    text = json.dumps(body).encode()
    head = (
        "POST /api/v1/sagas HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}"
    )
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(30)
    connection.sendall(head.encode() + b"\r\n\r\n" + text[:-5])
    return connection, text[-5:]


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    received = b""
    while chunk := connection.recv(65536):  # the server closes behind it: it is going
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_worker_that_is_told_to_stop_finishes_what_it_has_begun_and_another_goes_on_at_once(
    tmp_path: Path, postgres_dsn: str
) -> None:
    script: Script = {"Reserve": [{"delay_secs": 1.5, "once": True}], "*": [{"once": True}]}
    with two_servers(tmp_path, postgres_dsn, script, grace_secs=30.0) as (first, second, shop):
        sagas = [first.start_saga("good", {"order_id": f"o-{number}", "amount": 1}) for number in range(SAGAS)]
        until(lambda: len(shop.calls("Reserve")) == SAGAS, first)
        (leaving,) = {row[0] for row in ask(postgres_dsn, "SELECT owner FROM saga.saga_states")}
        connection, rest = post(first, {"workflow_name": "good", "payload": {"order_id": "o-late", "amount": 1}})
        first.signal(signal.SIGTERM)
        with connection:
            # While attempts are in flight it still answers, and says that it is not the one to ask.
            until(lambda: readiness(first) == (503, "draining"), first)
            connection.sendall(rest)
            status, answer = answer_of(connection)
        assert status == 201
        sagas.append(answer["saga_id"])
        assert first.wait() == 0
        assert ask(postgres_dsn, "SELECT 1 FROM saga.workers WHERE id = $1", leaving) == []
        for saga_id in sagas:
            assert second.ended(saga_id)["saga"]["status"] == "COMPLETED"
        # Nothing was cut off, so nothing was asked for twice.
        calls = shop.calls()
        assert len(calls) == 3 * len(sagas)
        check_ledger(calls, dict.fromkeys(sagas, "COMPLETED"))
        epochs = {call.metadata["saga-epoch"] for call in calls if call.metadata["saga-id"] in sagas[:SAGAS]}
        assert epochs == {"1", "2"}
        assert "Traceback" not in first.log + second.log


def test_attempts_that_outlast_the_grace_are_cut_off_and_made_again_elsewhere_at_once(
    tmp_path: Path, postgres_dsn: str
) -> None:
    script: Script = {"Reserve": [{"hang": True, "times": SAGAS}, {"once": True}], "*": [{"once": True}]}
    with two_servers(tmp_path, postgres_dsn, script, grace_secs=1.0) as (first, second, shop):
        sagas = [first.start_saga("good", {"order_id": f"o-{number}", "amount": 1}) for number in range(SAGAS)]
        until(lambda: len(shop.calls("Reserve")) == SAGAS, first)
        first.signal(signal.SIGTERM)
        assert first.wait() == 0
        for saga_id in sagas:
            assert second.ended(saga_id)["saga"]["status"] == "COMPLETED"
        calls = shop.calls()
        check_ledger(calls, dict.fromkeys(sagas, "COMPLETED"))
        # Cut off, and made again under their numbers and keys; nothing else was run twice.
        assert len(shop.calls("Reserve")) == 2 * SAGAS
        assert len(calls) == 4 * SAGAS
        assert "Traceback" not in first.log + second.log
