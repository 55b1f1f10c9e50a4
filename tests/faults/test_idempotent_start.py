"""One idempotency key, two workers, two requests at the same moment: one saga, whichever doors they come through.

Two real server processes on one Postgres. Each round sends two requests together, one to each worker, over connections
that are open already; who is first is left to chance, and both orders are right.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from k1s0.system.saga.v1 import saga_pb2 as pb

from tests.support.participants import Participant, participant
from tests.support.server_process import ServerProcess, server_process

ORDER = "name: order\nsteps:\n  - {name: reserve, service: shop, method: Inventory.Reserve}\n"
ROUNDS = 30
"""For each pair of doors. Enough that both workers come first many times."""


class Answer(NamedTuple):
    """What came of a start. `saga_id` None: the key had been used with another request."""

    saga_id: str | None
    replayed: bool = False


Start = Callable[[str, dict[str, Any]], Answer]
"""Starts a saga under a key with a payload."""


class Pair:
    """Two workers on one database, each with a client for either door."""

    def __init__(self, servers: list[ServerProcess], shop: Participant, stack: ExitStack) -> None:
        self.servers = servers
        self.shop = shop
        self.rest = [self._rest(server, stack) for server in servers]
        self.grpc = [self._grpc(server, stack) for server in servers]

        self.started: set[str] = set()

    def note(self, *answers: Answer) -> None:
        """Remembers the sagas that clients were told of."""
        self.started |= {answer.saga_id for answer in answers if answer.saga_id is not None}

    def has_started_nothing_else(self) -> bool:
        totals = [
            server.call("GET", "/api/v1/sagas?page_size=1")[1]["pagination"]["total_count"] for server in self.servers
        ]
        return totals == [len(self.started)] * 2

    def _rest(self, server: ServerProcess, stack: ExitStack) -> Start:
        connection = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)))

        def start(key: str, payload: dict[str, Any]) -> Answer:
            body = json.dumps({"workflow_name": "order", "payload": payload})
            connection.request(
                "POST", "/api/v1/sagas", body, {"Content-Type": "application/json", "Idempotency-Key": key}
            )
            answer = connection.getresponse()
            told = json.loads(answer.read())
            if answer.status == 409:
                assert told["error"]["code"] == "SYS_SAGA_CONFLICT"
                return Answer(None)
            assert (answer.status, told["status"]) == (201, "STARTED"), told
            assert answer.headers.get("Idempotent-Replayed") in (None, "true")
            return Answer(told["saga_id"], "Idempotent-Replayed" in answer.headers)

        return start

    def _grpc(self, server: ServerProcess, stack: ExitStack) -> Start:
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}"))
        call = channel.unary_unary(
            "/k1s0.system.saga.v1.SagaService/StartSaga",
            request_serializer=pb.StartSagaRequest.SerializeToString,
            response_deserializer=pb.StartSagaResponse.FromString,
        )

        def start(key: str, payload: dict[str, Any]) -> Answer:
            request = pb.StartSagaRequest(workflow_name="order", payload=json.dumps(payload).encode())
            try:
                answer = call(request, metadata=[("idempotency-key", key)], timeout=30)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                    raise
                return Answer(None)
            assert answer.status == "STARTED"
            return Answer(answer.saga_id, answer.replayed)

        return start


@pytest.fixture(scope="module")
def pair(postgres_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        shop = stack.enter_context(participant(flavour="grpclib", script={"*": [{"once": True}]}))
        dsn = stack.enter_context(postgres_server.cloned_database())
        servers = []
        for name in ("one", "two"):
            folder: Path = tmp_path_factory.mktemp(name)
            config = {"services": {"shop": shop.settings()}}
            servers.append(stack.enter_context(server_process(folder, config, env={"DATABASE_URL": dsn})))
        for server in servers:
            server.spawn()
        for server in servers:
            server.until_ready()
        servers[0].register(ORDER)
        yield Pair(servers, shop, stack)


def together(*asks: Callable[[], Answer]) -> list[Answer]:
    """All answers to requests that leave at the same moment."""
    barrier = threading.Barrier(len(asks))
    answers: list[Answer | BaseException | None] = [None] * len(asks)

    def ask(place: int) -> None:
        barrier.wait(30)
        try:
            answers[place] = asks[place]()
        except BaseException as error:
            answers[place] = error

    threads = [threading.Thread(target=ask, args=[place]) for place in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer for answer in answers if isinstance(answer, Answer)]


DOORS = ["rest rest", "grpc grpc", "rest grpc"]


def doors(pair: Pair, names: str) -> tuple[Start, Start]:
    """A way to each worker."""
    first, second = names.split()
    return getattr(pair, first)[0], getattr(pair, second)[1]


@pytest.mark.parametrize("names", DOORS)
def test_two_requests_with_one_key_at_two_workers_start_one_saga_and_one_is_told_so(pair: Pair, names: str) -> None:
    one, two = doors(pair, names)
    everywhere = [*pair.rest, *pair.grpc]
    started: set[str] = set()
    for number in range(ROUNDS):
        key, payload = f"same {names} {number}", {"order_id": f"o-{number}"}
        first, second = together(lambda: one(key, payload), lambda: two(key, payload))  # noqa: B023  called at once
        assert first.saga_id is not None
        assert first.saga_id == second.saga_id
        assert sorted([first.replayed, second.replayed]) == [False, True]
        started.add(first.saga_id)
        pair.note(first)
        # From now on every door of every worker says the same, and refuses anything else under this key.
        for ask in everywhere:
            assert ask(key, payload) == Answer(first.saga_id, replayed=True)
            assert ask(key, {"order_id": "another"}) == Answer(None)
    assert len(started) == ROUNDS
    assert pair.has_started_nothing_else()
    ended = [pair.servers[0].ended(saga_id)["saga"]["status"] for saga_id in sorted(started)]
    assert ended == ["COMPLETED"] * ROUNDS
    effects = pair.shop.effects()
    assert [effects[f"{saga_id}:0:execute"] for saga_id in sorted(started)] == [1] * ROUNDS


@pytest.mark.parametrize("names", DOORS)
def test_of_two_different_requests_with_one_key_at_two_workers_one_is_a_conflict(pair: Pair, names: str) -> None:
    one, two = doors(pair, names)
    for number in range(ROUNDS):
        key = f"different {names} {number}"
        answers = together(lambda: one(key, {"n": 1}), lambda: two(key, {"n": 2}))  # noqa: B023  called at once
        (won,) = [answer for answer in answers if answer.saga_id is not None]
        assert not won.replayed
        detail = pair.servers[1].call("GET", f"/api/v1/sagas/{won.saga_id}")[1]
        assert detail["saga"]["payload"] == {"n": 1 + answers.index(won)}
        pair.note(won)
    assert pair.has_started_nothing_else()


def test_a_key_has_255_characters_at_most_at_both_doors(pair: Pair) -> None:
    longest = "k" * 255
    told = pair.rest[0](longest, {})
    pair.note(told)
    assert pair.grpc[1](longest, {}) == Answer(told.saga_id, replayed=True)
    status, answer = pair.servers[0].call(
        "POST", "/api/v1/sagas", {"workflow_name": "order"}, Idempotency_Key=longest + "k"
    )
    assert (status, [detail["field"] for detail in answer["error"]["details"]]) == (400, ["Idempotency-Key"])
    with pytest.raises(grpc.RpcError) as caught:
        pair.grpc[0](longest + "k", {})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert pair.has_started_nothing_else()
