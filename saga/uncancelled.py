"""Seeing a write through although the client that asked for it has gone.

A disconnect cancels a request's task. A saga created but not handed to its supervisor would then wait for its worker's
lease to end; so what changes something runs to its end, in bounded time, whoever is still listening.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import trio

from saga.errors import Unavailable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

WRITE_SECS = 10.0
"""How long a write is given before it is cut off. A guess: far above any commit that is going to succeed. One that is
already on its way to the database cannot be cut off; the store bounds it (Postgres: `EXCHANGE_SECS`)."""


async def uncancelled(write: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """What `write(*args)` returns or raises; a cancel from outside waits for it, then takes effect.

    `Unavailable`: cut off after `WRITE_SECS`, or given up by the store; whether it happened is unknown.
    """
    with trio.move_on_after(WRITE_SECS, shield=True) as scope:
        result = await write(*args)
    if scope.cancelled_caught:
        raise Unavailable(f"the store did not answer within {WRITE_SECS:g} s; whether the change was made is unknown")
    await trio.lowlevel.checkpoint_if_cancelled()
    return result
