"""What makes a bearer token a principal. The table of those that make none is `tests/support/bad_tokens.py`; both doors
are shown it in `tests/web/test_access.py` and `tests/rpc/test_server_access.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from saga.access import Role
from saga.errors import Overloaded, TokenExpired, TokenInvalid, Unavailable
from server import jwks, tokens
from server.jwks import KeySet
from server.tokens import KEPT_SECS, LEEWAY_SECS, MAX_TOKEN_CHARS, TokenVerifier
from tests.support.issuer import AUDIENCE, ISSUER, Issuer, issuer, key_set, public_jwk, token, token_of
from tests.support.server_process import free_port
from tests.support.verifier import verifier


class Clock:
    """The wall clock, moved by hand."""

    def __init__(self) -> None:
        self.at = time.time()

    def __call__(self) -> float:
        return self.at


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({"realm_access": {"roles": ["sys_auditor"]}}, {Role.AUDITOR}),
        ({"realm_access": {"roles": ["x", 1, None, "sys_operator", "sys_operator"]}}, {Role.OPERATOR}),
        ({"realm_access": None, "resource_access": {"shop": {"roles": ["sys_admin"]}}}, {Role.ADMIN}),
        (
            {"realm_access": {"roles": ["sys_auditor"]}, "resource_access": {"a": [], "b": {"roles": ["sys_admin"]}}},
            {Role.AUDITOR, Role.ADMIN},
        ),
        ({"realm_access": {"roles": ["nothing of ours"]}}, set()),
    ],
    ids=["realm", "among others", "client", "both", "none"],
)
async def test_the_roles_of_the_realm_and_of_every_client_count(
    idp: Issuer, changes: dict[str, Any], roles: set[Role]
) -> None:
    async with verifier(idp) as access:
        principal = await access.authenticate(f"Bearer {token(**changes)}")
    assert principal.subject == "alice"
    assert principal.roles == roles


@pytest.mark.parametrize(
    "make",
    [
        lambda: token("rsa1", "RS384"),
        lambda: token("rsa1", "RS512"),
        lambda: token("rsa1", "PS256"),
        lambda: token("rsa1", "PS512"),
        lambda: token("p256"),
        lambda: token("p384"),
        lambda: token("p521"),
        lambda: token("ed1"),
        lambda: token("p384", header={"kid": None}),
        lambda: token(header={"typ": None}),
        lambda: token(header={"typ": "at+jwt"}),
        lambda: token(header={"typ": "application/AT+JWT"}),
        lambda: token(typ="Bearer"),
        lambda: token(aud=["account", AUDIENCE]),
        lambda: token(exp=time.time() + 3600.5),
        lambda: token(nbf=int(time.time()) - 1),
        lambda: token(filler="x" * 5000),
    ],
    ids=[
        *("RS384", "RS512", "PS256", "PS512", "ES256", "ES384", "ES512", "EdDSA", "no key id", "no type", "at+jwt"),
        *("at+jwt as media type", "Keycloak's type", "two audiences", "fraction of a second", "begun", "long"),
    ],
)
async def test_a_good_token_is_good_however_its_issuer_writes_it(idp: Issuer, make: Callable[[], str]) -> None:
    async with verifier(idp) as access:
        assert (await access.authenticate(f"Bearer {make()}")).roles == {Role.ADMIN}


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"sub": "b3f0", "client_id": "till"}, "b3f0"),
        ({"sub": None, "client_id": "till"}, "till"),
        ({"sub": None, "azp": "till"}, "till"),
    ],
)
async def test_a_client_without_a_subject_goes_by_its_name(idp: Issuer, changes: dict[str, Any], subject: str) -> None:
    async with verifier(idp) as access:
        assert (await access.authenticate(f"Bearer {token(**changes)}")).subject == subject


async def test_clocks_may_differ_by_less_than_ten_seconds(idp: Issuer) -> None:
    clock = Clock()
    async with verifier(idp, clock) as access:
        for good in (token(exp=clock.at - 9), token(nbf=clock.at + 9)):
            await access.authenticate(f"Bearer {good}")
        with pytest.raises(TokenExpired):
            await access.authenticate(f"Bearer {token(exp=clock.at - 10)}")
        with pytest.raises(TokenInvalid, match="not valid yet"):
            await access.authenticate(f"Bearer {token(nbf=clock.at + 11)}")


async def test_a_principal_knows_when_its_token_ends(idp: Issuer) -> None:
    clock = Clock()
    async with verifier(idp, clock) as access:
        before = trio.current_time()
        principal = await access.authenticate(f"Bearer {token(exp=clock.at + 100)}")
        assert before + 100 <= principal.ends_at - LEEWAY_SECS <= trio.current_time() + 100


async def test_a_token_is_verified_once_and_recognized_for_a_while(
    idp: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, good = Clock(), f"Bearer {token()}"
    async with verifier(idp, clock) as access:
        assert access.recognized(good) is None
        principal = await access.authenticate(good)
        monkeypatch.setattr(access, "_verified", None)  # no signature is looked at again
        assert access.recognized(good) is principal
        assert await access.authenticate(good) is principal
        assert access.recognized(good[:-1]) is access.recognized(None) is None
        assert access.recognized(f"Bearer {'x' * 2 * MAX_TOKEN_CHARS}") is None
        clock.at += KEPT_SECS
        assert access.recognized(good) is None


async def test_a_recognized_token_ends_with_its_time(idp: Issuer) -> None:
    clock = Clock()
    good = f"Bearer {token(exp=clock.at + 5)}"
    async with verifier(idp, clock) as access:
        await access.authenticate(good)
        clock.at += 5 + LEEWAY_SECS
        assert access.recognized(good) is None
        with pytest.raises(TokenExpired):
            await access.authenticate(good)


async def test_only_so_many_tokens_are_kept(idp: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_KEPT", 3)
    sent = [f"Bearer {token(sub=str(number))}" for number in range(5)]
    async with verifier(idp) as access:
        for each in sent:
            await access.authenticate(each)
        assert [access.recognized(each) is not None for each in sent] == [False, False, True, True, True]


async def test_what_is_refused_is_not_kept(idp: Issuer) -> None:
    async with verifier(idp) as access:
        for _ in range(2):
            with pytest.raises(TokenInvalid):
                await access.authenticate(f"Bearer {token(aud='shop')}")
        assert not access._kept


async def test_a_key_that_the_issuer_takes_back_takes_its_tokens_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 0.0)
    old, new = f"Bearer {token('rsa1')}", f"Bearer {token('rsa2')}"
    with issuer() as idp:
        async with verifier(idp) as access:
            await access.authenticate(old)
            idp.document = key_set(public_jwk("rsa2"))
            # Its key is not known yet: it is looked for at once.
            assert (await access.authenticate(new)).subject == "alice"
            assert access.recognized(old) is None
            with pytest.raises(TokenInvalid, match="does not list"):
                await access.authenticate(old)


async def test_while_the_issuer_is_away_known_keys_work_and_others_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 0.0)
    with issuer() as idp:
        async with verifier(idp) as access:
            idp.status = 500
            with pytest.raises(Unavailable):
                await access.authenticate(f"Bearer {token('rsa2')}")
            assert (await access.authenticate(f"Bearer {token('rsa1', sub='bob')}")).subject == "bob"
            # That a signature is wrong, or an algorithm not the key's, is known all the same.
            for bad in (token("rsa2", header={"kid": "rsa1"}), token("p256", header={"kid": "rsa1"}), "a.b.c"):
                with pytest.raises(TokenInvalid):
                    await access.authenticate(f"Bearer {bad}")
            idp.status, idp.document = 200, key_set(public_jwk("rsa2"))
            await access.authenticate(f"Bearer {token('rsa2')}")


async def test_a_crowd_with_invented_keys_neither_piles_up_nor_keeps_the_known_ones_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 0.0)
    monkeypatch.setattr(jwks, "MAX_WAITING", 3)
    stranger = f"Bearer {token('rsa2', header={'kid': 'invented'})}"
    with issuer() as slow:
        async with verifier(slow) as access:
            served, slow.is_held = slow.served, True
            async with trio.open_nursery() as crowd:

                async def refused() -> None:
                    with pytest.raises(TokenInvalid):
                        await access.authenticate(stranger)

                for _ in range(3):
                    crowd.start_soon(refused)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(10):
                    with pytest.raises(Overloaded):
                        await access.authenticate(stranger)
                assert (await access.authenticate(f"Bearer {token_of('sys_admin')}")).subject == "alice"
                slow.is_held = False
                slow.let_go.set()
            await refused()
            assert slow.served == served + 2


async def test_before_the_first_key_has_come_nobody_is_let_in_or_called_a_liar() -> None:
    keys = KeySet(f"http://127.0.0.1:{free_port()}/", 600)
    access = TokenVerifier(keys, issuer=ISSUER, audience=AUDIENCE)
    async with trio.open_nursery() as nursery:
        await nursery.start(keys.run)
        with pytest.raises(Unavailable):
            await access.authenticate(f"Bearer {token_of('sys_admin')}")
        with pytest.raises(TokenInvalid):
            await access.authenticate("Bearer garbage")
        nursery.cancel_scope.cancel()
