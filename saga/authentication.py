"""Finding out who asks: the port, and what stands behind it where there is no access control.

How a token is verified is a matter of `server/`; what a principal may do is `access.py`'s.
"""

from __future__ import annotations

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


class OpenAccess:
    """The `Authenticator` where the configuration has no `auth` section: everybody is `ANONYMOUS`."""

    def recognized(self, authorization: str | None) -> Principal | None:
        return ANONYMOUS

    async def authenticate(self, authorization: str | None) -> Principal:
        return ANONYMOUS
