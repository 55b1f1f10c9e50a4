"""Bearer tokens: who a request is from, told by a JWT that the configured issuer signed for this server.

The signature is PyJWT's matter, the keys are `jwks.py`'s; what a token must say beside is here. Nothing of a token is
ever logged or told, not even in an error.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import msgspec
import trio
from jwt.api_jws import PyJWS

from saga.access import Principal, Role
from saga.errors import MissingToken, TokenExpired, TokenInvalid, Unavailable
from server.jwks import ALGORITHMS, KeySet, VerifyingKey

MAX_TOKEN_CHARS = 8192
"""An issuer that puts more into a token meets the limits of proxies and browsers first."""
MAX_SUBJECT_CHARS = 255
LEEWAY_SECS = 10.0
"""How far the issuer's clock and ours may be apart."""
KEPT_SECS = 60.0
"""How long a verified token is taken again without looking at its signature; never longer than it is good for, and no
longer than the keys it was verified with are the newest."""
MAX_KEPT = 4096
"""How many of them, some 2 MiB; the oldest go first."""

SCHEME = "Bearer "
ACCEPTED = frozenset[str]().union(*ALGORITHMS.values())
ROLES = {role.value: role for role in Role}
ACCESS_TOKEN_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
"""`typ` of the header, where there is one (RFC 9068); others are logout tokens, proofs and the like."""


class _Header(msgspec.Struct):
    alg: str
    kid: str | None = None
    typ: str | None = None
    crit: Any = None


class _Claims(msgspec.Struct):
    iss: str
    aud: str | list[str]
    exp: float
    nbf: float | None = None
    sub: str | None = None
    client_id: str | None = None
    azp: str | None = None
    typ: str | None = None
    realm_access: Any = None
    resource_access: Any = None


class _Kept(msgspec.Struct, frozen=True):
    principal: Principal
    until: float
    """By `now`, as all times of tokens."""
    keys: tuple[VerifyingKey, ...]


class TokenVerifier:
    """The `Authenticator` over the keys of one issuer. `now` is the wall clock, in seconds since 1970."""

    def __init__(self, keys: KeySet, *, issuer: str, audience: str, now: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._now = now
        self._jws = PyJWS(algorithms=sorted(ACCEPTED))
        self._kept: dict[bytes, _Kept] = {}

    def recognized(self, authorization: str | None) -> Principal | None:
        if authorization is None or len(authorization) > len(SCHEME) + MAX_TOKEN_CHARS:
            return None
        kept = self._kept.get(_fingerprint(authorization))
        if kept is None or kept.keys is not self._keys.keys or self._now() >= kept.until:
            return None
        return kept.principal

    async def authenticate(self, authorization: str | None) -> Principal:
        known = self.recognized(authorization)
        if known is not None:
            return known
        token = _token(authorization)
        header = self._header(token)
        key = self._keys.find(header.kid, header.alg)
        if key is None and not self._keys.lists(header.kid):
            await self._keys.refetched()
            key = self._keys.find(header.kid, header.alg)
            if key is None and self._keys.failed:
                raise Unavailable("the keys of the token's issuer cannot be had now")
        if key is None:
            raise TokenInvalid("the token is signed with a key that its issuer does not list")
        keys = self._keys.keys
        principal, good_until = self._principal(self._verified(token, header.alg, key))
        if len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[_fingerprint(SCHEME + token)] = _Kept(principal, min(good_until, self._now() + KEPT_SECS), keys)
        return principal

    def _header(self, token: str) -> _Header:
        try:
            header = msgspec.convert(self._jws.get_unverified_header(token), _Header)
        except (jwt.PyJWTError, msgspec.ValidationError, ValueError, RecursionError) as error:
            raise TokenInvalid("the token is malformed") from error
        if header.alg not in ACCEPTED:
            raise TokenInvalid("the token is signed with an algorithm that is not accepted")
        if header.crit is not None:
            raise TokenInvalid("the token asks for an extension that is not known here")
        if header.typ is not None and header.typ.lower() not in ACCESS_TOKEN_TYPES:
            raise TokenInvalid("the token is no access token")
        return header

    def _verified(self, token: str, algorithm: str, key: VerifyingKey) -> _Claims:
        try:
            payload = self._jws.decode_complete(token, key.public, algorithms=[algorithm])["payload"]
        except (jwt.PyJWTError, ValueError) as error:
            raise TokenInvalid("the token's signature is wrong") from error
        try:
            return msgspec.json.decode(payload, type=_Claims)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise TokenInvalid("the token's claims are malformed, or iss, aud or exp is missing") from error

    def _principal(self, claims: _Claims) -> tuple[Principal, float]:
        """The principal, and until when by the wall clock it is one."""
        if claims.iss != self._issuer:
            raise TokenInvalid("the token is from another issuer")
        if self._audience not in ([claims.aud] if isinstance(claims.aud, str) else claims.aud):
            raise TokenInvalid("the token is for another audience")
        if claims.typ is not None and claims.typ.lower() != "bearer":
            # Keycloak's word for an ID or refresh token, which may be for the same audience.
            raise TokenInvalid("the token is no access token")
        now, good_until = self._now(), claims.exp + LEEWAY_SECS
        if claims.nbf is not None and claims.nbf > now + LEEWAY_SECS:
            raise TokenInvalid("the token is not valid yet")
        if now >= good_until:
            raise TokenExpired
        subject = claims.sub or claims.client_id or claims.azp
        if not subject or len(subject) > MAX_SUBJECT_CHARS or not subject.isprintable():
            raise TokenInvalid("the token names no subject that could be kept")
        principal = Principal(
            subject=subject,
            roles=frozenset(_roles(claims)),
            ends_at=trio.current_time() + (good_until - now),
        )
        return principal, good_until


def _token(authorization: str | None) -> str:
    if authorization is None:
        raise MissingToken
    if not authorization.startswith(SCHEME):
        raise TokenInvalid("Authorization is not: Bearer, one space, the token")
    token = authorization[len(SCHEME) :]
    if len(token) > MAX_TOKEN_CHARS:
        raise TokenInvalid(f"the token is longer than {MAX_TOKEN_CHARS} characters")
    if not token.isascii() or token.count(".") != 2:
        raise TokenInvalid("the token is malformed")
    return token


def _fingerprint(authorization: str) -> bytes:
    """Stands for the token where it is kept, so that a dump of this process's memory holds few that can be used."""
    return hashlib.sha256(authorization.encode("utf-8", "surrogateescape")).digest()


def _roles(claims: _Claims) -> Iterator[Role]:
    """The roles we know, of the realm and of every client; what has another shape gives none."""
    clients = claims.resource_access.values() if isinstance(claims.resource_access, dict) else ()
    for holder in (claims.realm_access, *clients):
        roles = holder.get("roles") if isinstance(holder, dict) else None
        for role in roles if isinstance(roles, list) else ():
            if isinstance(role, str) and role in ROLES:
                yield ROLES[role]
