"""A real hypercorn on a free port in front of a real orchestrator, and clients for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from saga.authentication import Authenticator, OpenAccess
from saga.door_limits import DoorLimits
from saga.payload_mask import NOTHING, PayloadMask
from tests.support.issuer import Issuer
from tests.support.orchestrator import House, orchestrator
from tests.support.verifier import verifier
from web.app import create_app
from web.metrics import PrometheusMeter
from web.serving import serve_rest


class Site:
    """An orchestrator, the port its REST door listens on, and a client that keeps one connection."""

    def __init__(self, house: House, port: int, client: httpx.AsyncClient, meter: PrometheusMeter) -> None:
        self.house = house
        self.port = port
        self.client = client
        self.meter = meter
        self.stopped = trio.Event()
        """Set when the REST door has stopped."""

    async def start(self, **body: object) -> str:
        """Starts a saga of the workflow `order`."""
        answer = await self.client.post("/api/v1/sagas", json={"workflow_name": "order", **body})
        assert answer.status_code == 201, answer.text
        saga_id: str = answer.json()["saga_id"]
        return saga_id

    async def ended(self, saga_id: str) -> dict[str, object]:
        """The saga with its logs, when it has come to its end."""
        answer = await self.client.get(f"/api/v1/sagas/{saga_id}", params={"wait_secs": 10})
        assert answer.status_code == 200, answer.text
        detail: dict[str, object] = answer.json()
        return detail


@asynccontextmanager
async def open_site(
    max_payload_bytes: int = 1 << 20,
    grace_secs: float = 5.0,
    authenticator: Authenticator | None = None,
    payload_mask: PayloadMask = NOTHING,
    limits: DoorLimits | None = None,
    *,
    loopback_names_only: bool = False,
) -> AsyncIterator[Site]:
    meter = PrometheusMeter()
    async with orchestrator(meter, max_payload_bytes, payload_mask) as house, trio.open_nursery() as nursery:
        app = create_app(
            house.service,
            authenticator=authenticator or OpenAccess(),
            drain=house.drain,
            version="1.2.3",
            meter=meter,
            payload_mask=payload_mask,
            limits=limits,
            loopback_names_only=loopback_names_only,
        )
        started: list[Site] = []

        async def serve(task_status: trio.TaskStatus[int]) -> None:
            await serve_rest(
                app,
                "127.0.0.1",
                0,
                shutdown_trigger=house.drain.wait,
                grace_secs=grace_secs,
                task_status=task_status,
            )
            started[0].stopped.set()

        port = await nursery.start(serve)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            started.append(Site(house, port, client, meter))
            yield started[0]
        house.drain.begin()
        with trio.fail_after(10):
            await started[0].stopped.wait()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def guarded_site(idp: Issuer) -> AsyncIterator[Site]:
    """A site that asks for tokens of this issuer."""
    async with verifier(idp) as access, open_site(authenticator=access) as site:
        yield site


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with open_site() as opened:
        yield opened
