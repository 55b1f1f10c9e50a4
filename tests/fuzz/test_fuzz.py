"""Some of what `make fuzz` does in numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import definitions, hostile, wire
from tests.fuzz.target import GROWTH_BYTES, target


def test_whatever_becomes_of_a_definition_it_is_taken_or_every_fault_is_told_with_its_path() -> None:
    seen = definitions.run(600)
    assert seen["taken"] > 0
    assert seen["refused"] > 0


async def test_random_calls_and_frames_are_answered_and_leave_nothing_behind(tmp_path: Path) -> None:
    with target(tmp_path) as server:
        seen, grown = await wire.run(server.grpc_port, 400, 1, server.rss)
        server.check()
    assert seen["connection"] == 200
    assert seen.total() == 400
    assert seen["status 3"] > 0
    assert grown < GROWTH_BYTES


async def test_the_server_does_not_grow_by_hostile_requests(tmp_path: Path) -> None:
    with target(tmp_path) as server:
        before = server.rss()
        for name, port, kind in hostile.kinds(server.port, server.grpc_port):
            await hostile.run(port, kind, 6, server.rss, (server.port, server.grpc_port))
            assert server.rss() - before < GROWTH_BYTES, name
        server.check()


@pytest.mark.parametrize("text", ["name: a", "- 1", b"\xff", "", "steps: [{name: 1}]"])
def test_the_check_itself_looks_at_every_fault(text: str | bytes) -> None:
    assert definitions.check(text) == "refused"
