"""What the catalog keeps in memory."""

from __future__ import annotations

import pytest
import trio.testing

from saga import catalog
from tests.support.world import Worker, World, memory_store

WORKFLOW = "name: {name}\nsteps:\n  - {{name: reserve, service: svc, method: Inventory.Reserve}}\n"


async def test_the_definitions_used_last_are_kept_and_the_store_is_asked_for_others(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "KEPT_VERSIONS", 2)
    asked: list[object] = []

    async def note(*args: object) -> None:
        asked.append(args)

    world = World()
    async with memory_store(world) as store, Worker(store.port, world).at_work() as worker:
        for name in ("first", "second", "third"):
            await worker.service.register_workflow(WORKFLOW.format(name=name))
        store.before["workflow"] = note

        async def is_kept(name: str) -> bool:
            asked.clear()
            assert (await worker.catalog.version(name, 1)).definition.name == name
            return not asked

        assert await is_kept("second")
        assert await is_kept("third")
        assert not await is_kept("first")
        assert await is_kept("third")
        assert not await is_kept("second")
        assert not await is_kept("first")
        for name in ("first", "second", "third"):
            assert (await worker.catalog.newest(name)).definition.name == name
