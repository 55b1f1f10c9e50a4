"""The keys that tokens are signed with: the issuer's JWKS document, fetched in the background and kept.

The keys that are known go on working while the issuer is away; they are replaced as a whole by the next document that
has any. Who meets a key id that is not known waits for one more fetch; such fetches are rate-limited and shared, for
anyone can send tokens with invented key ids. What is in the document is untrusted up to a point: its size is bounded,
keys that are broken, weak, private or symmetric are left out, and the rest work on.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from rpc.outcomes import NO_TLS
from saga.authentication import KeysState
from saga.errors import Overloaded

log = logging.getLogger("saga.server.jwks")

# Both log URLs, and the one of the key set may hold a password.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

MAX_DOCUMENT_BYTES = 512 * 1024
"""Far above any key set; an issuer with a certificate chain beside each of ten keys has some 50 KiB."""
MAX_KEYS = 100
FETCH_SECS = 5.0
"""How long one fetch may take in all. A guess: the first request after a rotation waits for it."""
REFETCH_SECS = 5.0
"""The least time between two fetches that unknown key ids ask for; a token signed by a new key waits no longer."""
MAX_WAITING = 100
"""Requests that wait for one fetch at a time. A guess: anyone can send tokens with invented key ids, and while the
issuer is slow each of them takes a place that others need."""
RETRY_SECS = (1.0, 30.0)
"""Pause after a failed fetch: first and longest, doubling."""

RSA_BITS = range(2048, 8192 + 1)
"""Shorter ones are weak (RFC 7518, 3.3); checking a signature of a longer one costs too much for whoever may ask."""

ALGORITHMS = {
    ("RSA", None): frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA"}),
}
"""What a key of each type and curve may verify. There is no symmetric algorithm here, and `none` is none."""

_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity"}
"""What is compressed has no bound on what it becomes."""
_PUBLIC_MEMBERS = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}
_PRIVATE_MEMBERS = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")


class VerifyingKey(msgspec.Struct, frozen=True, kw_only=True):
    """A public key, the id it goes by, and the algorithms it may verify."""

    kid: str | None
    algorithms: frozenset[str]
    public: RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


class KeysUnavailable(Exception):
    """The document could not be had; the text says why, without the address."""


class KeySet:
    """The keys of one issuer. `run` keeps them fresh; without it they never come."""

    def __init__(self, url: str, ttl_secs: float) -> None:
        self._url = url
        self._ttl_secs = ttl_secs
        self._tls: ssl.SSLContext | None = None
        self._asked = trio.Event()
        self._flight: trio.Event | None = None
        self._waiting = 0
        self._fetched_at = float("-inf")
        self._pause_secs = RETRY_SECS[0]
        self._shown_url = _without_credentials(url)
        self._trouble: str | None = None
        self._failing_since = 0.0
        self.fetches = {"ok": 0, "failed": 0}
        """How many there were, by how they ended."""
        self.fetched_at = 0.0
        """When the keys came last, in seconds since 1970; 0: never."""
        self.keys: tuple[VerifyingKey, ...] = ()
        """Replaced by each fetch that succeeds, never changed; whoever keeps what they verified compares it."""
        self.failed = True
        """The last fetch failed, or there was none: a key that is not here may exist all the same."""

    @property
    def state(self) -> KeysState:
        """What `/readyz` says of them."""
        if not self.keys:
            return KeysState.MISSING
        is_old = self.failed and trio.current_time() >= self._failing_since + self._ttl_secs
        return KeysState.OLD if is_old else KeysState.KNOWN

    def find(self, kid: str | None, algorithm: str) -> VerifyingKey | None:
        """The key of that id for that algorithm; without an id, the only key there is for the algorithm."""
        fit = [key for key in self.keys if algorithm in key.algorithms and (kid is None or key.kid == kid)]
        if kid is None and len(fit) > 1:
            return None
        return fit[0] if fit else None

    def lists(self, kid: str | None) -> bool:
        """Whether there is a key of that id (any key, without one), for whatever algorithm."""
        return any(kid is None or key.kid == kid for key in self.keys)

    async def refetched(self) -> None:
        """Returns when the document has been fetched anew; at once if that was done less than `REFETCH_SECS` ago.
        `Overloaded`: many wait for it already."""
        if self._flight is None:
            if trio.current_time() < self._fetched_at + REFETCH_SECS:
                return
            self._flight = trio.Event()
            self._asked.set()
        if self._waiting >= MAX_WAITING:
            raise Overloaded("the keys of the token's issuer are being fetched for many; try again")
        self._waiting += 1
        try:
            await self._flight.wait()
        finally:
            self._waiting -= 1

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetches for ever: when the keys are too old, when a failure is to be made good, when somebody asks."""
        task_status.started()  # the server starts without its keys too
        while True:
            pause_secs = await self.run_once()
            with trio.move_on_after(pause_secs):
                await self._asked.wait()

    async def run_once(self) -> float:
        """One fetch; returns after how many seconds the next is due. Those who wait for it are told in any case."""
        self._asked = trio.Event()
        if self._flight is None:
            self._flight = trio.Event()
        flight = self._flight
        try:
            keys = await self._fetch()
        except KeysUnavailable as error:
            self._note_failure(str(error))
            pause_secs = self._pause_secs
            self._pause_secs = min(pause_secs * 2, RETRY_SECS[1])
        else:
            if {key.kid for key in keys} != {key.kid for key in self.keys} or self.failed:
                log.info("jwks_loaded url=%s keys=%d", self._shown_url, len(keys))
            self.keys, self.failed, self._trouble = keys, False, None
            self.fetches["ok"] += 1
            self.fetched_at = time.time()
            pause_secs, self._pause_secs = self._ttl_secs, RETRY_SECS[0]
        finally:
            self._fetched_at = trio.current_time()
            self._flight = None
            flight.set()
        return pause_secs

    def _note_failure(self, reason: str) -> None:
        """Logs an outage once, and once more when it has another cause: somebody may be mending it."""
        if self._trouble is None:
            self._failing_since = trio.current_time()
        self.failed = True
        self.fetches["failed"] += 1
        if reason != self._trouble:
            self._trouble = reason
            log.warning(
                "jwks_unavailable url=%s known_keys=%d error=%s", self._shown_url, len(self.keys), self._trouble
            )

    async def _fetch(self) -> tuple[VerifyingKey, ...]:
        if self._tls is None:
            try:
                # Reading the authorities of this machine takes tens of milliseconds; once is enough.
                self._tls = await trio.to_thread.run_sync(httpx.create_ssl_context)
            except OSError as error:
                raise KeysUnavailable(f"the certificates of authorities cannot be read: {error.strerror}") from error
        status, body = 0, bytearray()
        try:
            with trio.move_on_after(FETCH_SECS) as scope:
                # A client for each fetch: nothing of a connection that died in between is met minutes later.
                async with (
                    httpx.AsyncClient(verify=self._tls, timeout=FETCH_SECS) as client,
                    client.stream("GET", self._url, headers=_HEADERS) as answer,
                ):
                    status = answer.status_code
                    async for chunk in answer.aiter_raw():
                        body += chunk
                        if len(body) > MAX_DOCUMENT_BYTES:
                            # To leave the loop would leave httpx's generators unfinished.
                            scope.cancel()
        except Exception as error:  # whatever a library makes of an answer, the server outlives it
            raise KeysUnavailable(_in_words(error)) from error
        if len(body) > MAX_DOCUMENT_BYTES:
            raise KeysUnavailable(f"more than {MAX_DOCUMENT_BYTES} bytes")
        if scope.cancelled_caught:
            raise KeysUnavailable(f"no answer within {FETCH_SECS:g} s")
        if status != 200:
            raise KeysUnavailable(f"status {status}")
        keys = read_keys(bytes(body))
        if not keys:
            # Nobody rotates to nothing; whatever it is, the known keys are better.
            raise KeysUnavailable("no usable key in the document")
        return keys


def _without_credentials(url: str) -> str:
    """An address as a log line may have it: no user, no password, no query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "?"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _in_words(error: BaseException) -> str:
    """Why a fetch failed, by what was raised first. None of the texts of libraries that may hold the address."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            words = (cause.reason or "unknown").replace("_", " ").lower()
            return f"it does not speak TLS ({words})" if cause.reason in NO_TLS else f"TLS: {words}"
        if isinstance(cause, socket.gaierror):
            return "the name of its host is not known"
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        if isinstance(cause, httpx.RemoteProtocolError):
            return "it does not speak HTTP here, or ends its answer early"
    return type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came of; Trio puts what each address of a host answered into a group."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _causes(each)
        error = error.__cause__ or error.__context__


class _Document(msgspec.Struct):
    keys: list[Any]


class _Jwk(msgspec.Struct):
    kty: str
    kid: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    alg: str | None = None
    crv: str | None = None


def read_keys(document: bytes) -> tuple[VerifyingKey, ...]:
    """The usable keys of a JWKS document, in its order. `KeysUnavailable`: it is none."""
    try:
        entries = msgspec.json.decode(document, type=_Document).keys
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise KeysUnavailable("the document is no key set") from error
    if len(entries) > MAX_KEYS:
        log.warning("jwks_keys_left_out count=%d most=%d", len(entries) - MAX_KEYS, MAX_KEYS)
    keys: list[VerifyingKey] = []
    for number, entry in enumerate(entries[:MAX_KEYS]):
        try:
            key = _key(entry)
        except (ValueError, TypeError, jwt.PyJWTError) as error:
            # Only texts of ours and the library's class: the key itself may be private.
            reason = error if type(error) is ValueError else type(error).__name__
            log.warning("jwks_key_ignored number=%d reason=%s", number, reason)
        else:
            keys += [key] if key else []
    return tuple(keys)


def _key(entry: Any) -> VerifyingKey | None:
    """None: a key that is none for signatures, as issuers list beside the others. Errors say what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError("no JSON object")
    jwk = msgspec.convert(entry, _Jwk)
    if any(name in entry for name in _PRIVATE_MEMBERS):
        raise ValueError("private or symmetric")
    if jwk.use not in (None, "sig") or (jwk.key_ops is not None and "verify" not in jwk.key_ops):
        return None
    algorithms = ALGORITHMS.get((jwk.kty, None if jwk.kty == "RSA" else jwk.crv))
    if algorithms is None:
        raise ValueError("unknown type or curve")
    if jwk.alg is not None:
        algorithms &= {jwk.alg}
    if not algorithms:
        raise ValueError("for an algorithm that is not accepted")
    members = {name: entry.get(name) for name in ("kty", *_PUBLIC_MEMBERS[jwk.kty])}
    if not all(isinstance(value, str) for value in members.values()):
        raise ValueError("incomplete")
    public = jwt.PyJWK(members, min(algorithms)).key
    if isinstance(public, RSAPublicKey) and public.key_size not in RSA_BITS:
        raise ValueError(f"{public.key_size} bits")
    return VerifyingKey(kid=jwk.kid, algorithms=algorithms, public=public)
