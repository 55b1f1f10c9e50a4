"""Who may do what (spec section 9), written down a second time."""

from __future__ import annotations

import pytest

from saga.access import (
    ANONYMOUS,
    NOBODY,
    Permission,
    Principal,
    Role,
    require,
    single_authorization,
)
from saga.authentication import OpenAccess
from saga.errors import MissingToken, PermissionDenied, TokenInvalid

READS = {"read sagas", "read workflows", "read audit"}
WRITES = {"write sagas", "write workflows"}
MATRIX = {"sys_auditor": READS, "sys_operator": READS | WRITES, "sys_admin": READS | WRITES}


def somebody(*roles: Role) -> Principal:
    return Principal(subject="alice", roles=frozenset(roles))


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("permission", list(Permission))
def test_a_role_may_do_what_the_matrix_says_and_nothing_else(role: Role, permission: Permission) -> None:
    assert somebody(role).may(permission) == (permission == "open" or permission.value in MATRIX[role.value])


@pytest.mark.parametrize("permission", list(Permission))
def test_without_a_role_only_what_is_open_is_allowed(permission: Permission) -> None:
    assert somebody().may(permission) == NOBODY.may(permission) == (permission is Permission.OPEN)


def test_several_roles_may_do_what_any_of_them_may() -> None:
    require(somebody(Role.AUDITOR, Role.OPERATOR), Permission.WRITE_SAGAS)


def test_who_is_refused_is_told_what_they_may_not_and_who_showed_no_token_that_one_is_needed() -> None:
    with pytest.raises(PermissionDenied, match="write workflows"):
        require(somebody(Role.AUDITOR), Permission.WRITE_WORKFLOWS)
    with pytest.raises(MissingToken):
        require(NOBODY, Permission.READ_SAGAS)
    require(NOBODY, Permission.OPEN)


def test_one_authorization_is_taken_and_of_several_none() -> None:
    assert single_authorization([]) is None
    assert single_authorization(["Bearer x"]) == "Bearer x"
    with pytest.raises(TokenInvalid):
        single_authorization(["Bearer x", "Bearer x"])


async def test_without_access_control_everybody_is_anonymous_and_may_do_everything() -> None:
    access = OpenAccess()
    assert access.recognized(None) is await access.authenticate("Bearer whatever") is ANONYMOUS
    assert all(ANONYMOUS.may(permission) for permission in Permission)
    assert ANONYMOUS.ends_at == float("inf")
