"""A token verifier over the keys of a real issuer, in this process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from server.jwks import KeySet
from server.tokens import TokenVerifier
from tests.support.issuer import AUDIENCE, ISSUER, Issuer


@asynccontextmanager
async def verifier(idp: Issuer, now: Callable[[], float] = time.time) -> AsyncIterator[TokenVerifier]:
    """Its keys are loaded, and kept fresh for as long as the block lasts."""
    keys = KeySet(idp.url, 600)
    async with trio.open_nursery() as nursery:
        await nursery.start(keys.run)
        await keys.refetched()
        yield TokenVerifier(keys, issuer=ISSUER, audience=AUDIENCE, now=now)
        nursery.cancel_scope.cancel()
