"""The yardstick: raw grpclib unary calls in one process, on asyncio's own loop, with nothing around them.

`python -m bench.raw PORT CALLS CONCURRENCY` prints calls a second and CPU microseconds a call as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from grpclib.client import Channel, UnaryUnaryMethod

from bench.participant import METHOD, Reply, Request


async def main(port: int, calls: int, concurrency: int) -> None:
    channel = Channel("127.0.0.1", port)
    method: UnaryUnaryMethod[Any, Any] = UnaryUnaryMethod(channel, METHOD, Request, Reply)
    left = calls

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await method(Request(order_id="o-1", quantity=1), timeout=30)

    await method(Request(order_id="warm", quantity=1))
    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"calls_per_s": calls / wall, "cpu_us": cpu / calls * 1e6}))
    channel.close()


if __name__ == "__main__":
    asyncio.run(main(*(int(argument) for argument in sys.argv[1:4])))
