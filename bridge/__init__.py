"""Where the two worlds meet: Trio functions that run asyncio coroutines on the loop inside Trio, and back.

`store/` and `rpc/` touch asyncio libraries only through these. Importing this package imports trio_asyncio, which must
happen before grpclib on Python 3.12+ (grpclib binds `asyncio.current_task` at import).
"""

from __future__ import annotations

import trio_asyncio  # type: ignore[import-untyped]  # isort: skip  (first, see above)

from bridge.crossing import StrayCancel, call_trio, open_loop, run_aio, running_loop

__all__ = ["StrayCancel", "call_trio", "open_loop", "run_aio", "running_loop", "trio_asyncio"]
