"""What the tests of the caller share: a step to be called, and a caller inside an open loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import bridge
from rpc.caller import GrpcStepCaller
from rpc.channels import PoolLimits
from rpc.settings import ServiceSettings
from saga.model import StepAction
from saga.ports import StepCall
from tests.support.participants import Participant


def step(method: str = "shop.v1.Inventory.Reserve", **changes: Any) -> StepCall:
    """An attempt that fits the scripted participants, with `changes`."""
    values: dict[str, Any] = {
        "service": "shop",
        "method": method,
        "request": {"order_id": "o-1"},
        "strict": False,
        "timeout_secs": 10.0,
        "saga_id": "saga-1",
        "workflow_name": "order",
        "step_name": "reserve",
        "step_index": 0,
        "action": StepAction.EXECUTE,
        "attempt": 1,
        "epoch": 1,
        "idempotency_key": "saga-1:0:execute",
        "correlation_id": None,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    return StepCall(**(values | changes))


@asynccontextmanager
async def calling(
    services: dict[str, ServiceSettings] | Participant,
    *,
    max_payload_bytes: int = 1_048_576,
    limits: PoolLimits | None = None,
) -> AsyncIterator[GrpcStepCaller]:
    """A caller that knows `services`, or one participant by the name "shop"."""
    if isinstance(services, Participant):
        services = {"shop": ServiceSettings(**services.settings())}
    async with bridge.open_loop():
        caller = GrpcStepCaller(services, max_payload_bytes=max_payload_bytes, limits=limits)
        try:
            yield caller
        finally:
            await caller.aclose()
