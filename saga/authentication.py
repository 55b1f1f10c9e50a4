"""Finding out who asks: the port, and what stands behind it where there is no access control.

How a token is verified is a matter of `server/`; what a principal may do is `access.py`'s.
"""

from __future__ import annotations

import enum
from typing import Protocol

from saga.access import ANONYMOUS, Principal


class Authenticator(Protocol):
    """Makes a principal of an `Authorization` header (HTTP) or its metadata (gRPC)."""

    def recognized(self, authorization: str | None) -> Principal | None:
        """The principal of a header that was verified a short while ago and still holds; None: ask `authenticate`.

        Never waits, so that a busy client's calls pay for its token once.
        """
        ...

    async def authenticate(self, authorization: str | None) -> Principal:
        """The principal. `MissingToken`, `TokenInvalid`, `TokenExpired`; `Unavailable`: it cannot be told now."""
        ...


class KeysState(enum.StrEnum):
    """What is known of the keys that tokens are signed with."""

    KNOWN = "ok"
    OLD = "old"
    """They could not be fetched anew for as long as they were meant to be kept. They go on working."""
    MISSING = "missing"
    """There never were any: nobody can be let in."""


class OpenAccess:
    """The `Authenticator` where the configuration has no `auth` section: everybody is `ANONYMOUS`."""

    def recognized(self, authorization: str | None) -> Principal | None:
        return ANONYMOUS

    async def authenticate(self, authorization: str | None) -> Principal:
        return ANONYMOUS
