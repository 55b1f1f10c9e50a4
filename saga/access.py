"""Who asks, and who may do what: principals, roles, and the permission each operation needs (spec section 9).

Pure: how it is found out who asks is `authentication.py`'s; which operation needs which permission is said where the
operation is (`web/api.py`, `rpc/server.py`). What nobody was given is refused.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence

import msgspec

from saga.errors import MissingToken, PermissionDenied, TokenInvalid


class Role(enum.StrEnum):
    """The roles that mean something here; a token's others are not kept."""

    AUDITOR = "sys_auditor"
    OPERATOR = "sys_operator"
    ADMIN = "sys_admin"


class Permission(enum.StrEnum):
    """What an operation needs its caller to be allowed. OPEN: nothing, not even a token."""

    OPEN = "open"
    READ_SAGAS = "read sagas"
    WRITE_SAGAS = "write sagas"
    READ_WORKFLOWS = "read workflows"
    WRITE_WORKFLOWS = "write workflows"
    READ_AUDIT = "read audit"


_READS = frozenset({Permission.READ_SAGAS, Permission.READ_WORKFLOWS, Permission.READ_AUDIT})

GRANTS: Mapping[Role, frozenset[Permission]] = {
    Role.AUDITOR: _READS,
    Role.OPERATOR: _READS | {Permission.WRITE_SAGAS, Permission.WRITE_WORKFLOWS},
    Role.ADMIN: frozenset(Permission),
}
"""What each role may do; somebody with several may do what any of them may."""


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who a request is from.

    `ends_at` is the instant of `trio.current_time()` from which the token is no longer good; what waits on behalf of
    this principal ends then. `is_unrestricted`: there is no access control, everybody may do everything.
    """

    subject: str
    roles: frozenset[Role] = frozenset()
    ends_at: float = math.inf
    is_unrestricted: bool = False

    @property
    def is_identified(self) -> bool:
        """A token has told who it is."""
        return not self.is_unrestricted and self is not NOBODY

    def may(self, permission: Permission) -> bool:
        """Whether this principal is allowed what `permission` stands for."""
        return (
            permission is Permission.OPEN
            or self.is_unrestricted
            or any(permission in GRANTS[role] for role in self.roles)
        )


ANONYMOUS = Principal(subject="anonymous", is_unrestricted=True)
"""Everybody, where the configuration has no `auth` section."""


NOBODY = Principal(subject="nobody")
"""Who was not asked for a token, as on what is open to all."""


def require(principal: Principal, permission: Permission) -> None:
    """Returns if `principal` may; `PermissionDenied` names what is missing. `MissingToken`: it is `NOBODY`."""
    if not principal.may(permission):
        if principal is NOBODY:
            raise MissingToken
        raise PermissionDenied(f"none of the roles in the token may {permission}")


def single_authorization(values: Sequence[str]) -> str | None:
    """The one `Authorization` of a request, None without any. `TokenInvalid`: several; no one may choose among them."""
    if len(values) > 1:
        raise TokenInvalid("Authorization is given more than once")
    return values[0] if values else None
