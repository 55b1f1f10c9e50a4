"""The issuer's keys, from a real HTTP server that is down, slow, wrong, or changes its mind."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from saga.authentication import KeysState
from server import jwks
from server.jwks import KeySet, KeysUnavailable, read_keys
from tests.support.certificates import certificate, server_context
from tests.support.issuer import Issuer, issuer, key_set, private_jwk, public_jwk
from tests.support.server_process import free_port


@pytest.fixture(name="idp")
def _idp() -> Iterator[Issuer]:
    with issuer() as opened:
        yield opened


@asynccontextmanager
async def running(keys: KeySet) -> AsyncIterator[KeySet]:
    async with trio.open_nursery() as nursery:
        await nursery.start(keys.run)
        with trio.fail_after(20):
            yield keys
        nursery.cancel_scope.cancel()


def ids(keys: KeySet) -> set[str | None]:
    return {key.kid for key in keys.keys}


async def test_every_kind_of_key_is_taken_with_the_algorithms_it_may_verify(idp: Issuer) -> None:
    keys = KeySet(idp.url, 600)
    assert await keys.run_once() == 600
    assert {key.kid: set(key.algorithms) for key in keys.keys} == {
        "rsa1": {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"},
        "p256": {"ES256"},
        "p384": {"ES384"},
        "p521": {"ES512"},
        "ed1": {"EdDSA"},
    }
    found = keys.find("rsa1", "PS256")
    assert found is not None
    assert found.kid == "rsa1"
    assert keys.find("rsa1", "ES256") is keys.find("nope", "RS256") is None


async def test_without_an_id_the_only_key_for_the_algorithm_is_found_and_none_of_two(idp: Issuer) -> None:
    keys = KeySet(idp.url, 600)
    await keys.run_once()
    found = keys.find(None, "RS256")
    assert found is not None
    assert found.kid == "rsa1"
    idp.document = key_set(public_jwk("rsa1"), public_jwk("rsa2"))
    await keys.run_once()
    assert keys.find(None, "RS256") is None


def test_keys_that_cannot_be_used_are_left_out_and_the_others_work(caplog: pytest.LogCaptureFixture) -> None:
    document = key_set(
        private_jwk("rsa1"),
        private_jwk("p256"),
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LTEyMzQ", "kid": "mac", "alg": "HS256"},
        public_jwk("rsa1024"),
        public_jwk("k256"),
        public_jwk("rsa1", use="enc", alg="RSA-OAEP"),
        public_jwk("rsa1", alg="RS1"),
        public_jwk("rsa1", use=None, key_ops=["encrypt"]),
        public_jwk("rsa1", n=None),
        public_jwk("rsa1", n="!!!"),
        public_jwk("rsa1", n=7),
        public_jwk("rsa1", e="AA"),
        public_jwk("p256", x="AAAA"),
        public_jwk("p256", crv="P-384"),
        public_jwk("p256", y=public_jwk("p256")["x"]),
        public_jwk("ed1", crv="X25519"),
        public_jwk("ed1", x=""),
        public_jwk("rsa1", kty="none"),
        public_jwk("rsa1", kid=7),
        "a word",
        None,
        public_jwk("rsa2", alg="RS512"),
        public_jwk("p256", kid=None),
    )
    with caplog.at_level(logging.WARNING):
        keys = read_keys(document)
    assert [(key.kid, set(key.algorithms)) for key in keys] == [("rsa2", {"RS512"}), (None, {"ES256"})]
    assert "jwks_key_ignored number=0 reason=private or symmetric" in caplog.text
    assert "jwks_key_ignored number=3 reason=1024 bits" in caplog.text
    # Issuers list keys for encryption beside the others; there is nothing wrong with them.
    assert not any(f"number={number} " in caplog.text for number in (5, 7))
    private = private_jwk("rsa1")
    assert not any(private[member] in caplog.text for member in ("d", "p", "n"))


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": null}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"keys": ' + b"[" * 100_000,
    ],
    ids=["empty", "page", "list", "no keys", "keys no list", "null", "no text", "deep", "deep inside"],
)
def test_what_is_no_key_set_is_refused(document: bytes) -> None:
    with pytest.raises(KeysUnavailable):
        read_keys(document)


def test_no_more_keys_are_read_than_any_issuer_has(caplog: pytest.LogCaptureFixture) -> None:
    document = key_set(*(public_jwk("p256", kid=str(number)) for number in range(jwks.MAX_KEYS + 1)))
    assert len(read_keys(document)) == jwks.MAX_KEYS
    assert "jwks_keys_left_out count=1" in caplog.text


async def test_the_known_keys_stay_while_the_issuer_is_wrong_in_any_way(
    idp: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeySet(idp.url, 600)
    await keys.run_once()
    good, known = idp.document, keys.keys
    for status, document, headers, told in (
        (500, good, {}, "status 500"),
        (404, good, {}, "status 404"),
        (204, b"", {}, "status 204"),
        (302, b"", {"Location": idp.url}, "status 302"),
        (302, b"", {"Location": "http://xn--/"}, "error=IDNAError"),
        (200, b"garbage", {}, "no key set"),
        (200, key_set(), {}, "no usable key"),
        (500, good, {}, "status 500"),
        (200, key_set(private_jwk("rsa1")), {}, "no usable key"),
        (200, good + b" " * jwks.MAX_DOCUMENT_BYTES, {}, "more than 524288 bytes"),
        (200, good, {"Content-Encoding": "gzip", "X": "y"}, None),
    ):
        idp.status, idp.document, idp.headers = status, document, headers
        caplog.clear()
        await keys.run_once()
        if told is not None:
            assert keys.keys is known
            assert keys.failed
            assert told in caplog.text
            assert "known_keys=5" in caplog.text
        else:
            assert not keys.failed  # what was not compressed is read as it is, whatever it says


async def test_an_issuer_that_is_away_is_asked_again_ever_more_slowly_and_told_once_without_credentials(
    idp: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    keys = KeySet(f"http://user:secret@127.0.0.1:{port}/certs?token=hidden", 600)
    with caplog.at_level(logging.DEBUG):
        pauses = [await keys.run_once() for _ in range(7)]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert keys.failed
    told = f"jwks_unavailable url=http://127.0.0.1:{port}/certs known_keys=0 error=Connection refused"
    assert [line for line in caplog.messages if "jwks" in line] == [told]
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text


async def test_an_outage_is_told_again_when_it_has_another_cause_and_when_it_is_over(
    idp: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeySet(idp.url, 600)
    with caplog.at_level(logging.INFO):
        for status in (200, 200, 500, 500, 404, 404, 200, 200, 404):
            idp.status = status
            await keys.run_once()
    assert [line.replace(idp.url, "URL") for line in caplog.messages if "jwks" in line] == [
        "jwks_loaded url=URL keys=5",
        "jwks_unavailable url=URL known_keys=5 error=status 500",
        "jwks_unavailable url=URL known_keys=5 error=status 404",
        "jwks_loaded url=URL keys=5",
        "jwks_unavailable url=URL known_keys=5 error=status 404",
    ]


class NoNames(trio.abc.HostnameResolver):
    """A machine on which no name is known."""

    async def getaddrinfo(self, *_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *_: Any) -> Any:
        raise AssertionError("nobody asks")


async def says_hello(stream: trio.SocketStream) -> None:
    """A server of something else."""
    with suppress(trio.BrokenResourceError):
        await stream.send_all(b"SSH-2.0-hello\r\n")
        await stream.receive_some()


async def test_what_keeps_the_keys_away_is_told_in_words(
    idp: Issuer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trio.socket.set_custom_hostname_resolver(NoNames())
    async with trio.open_nursery() as nursery:
        (other,) = await nursery.start(partial(trio.serve_tcp, says_hello, 0, host="127.0.0.1"))
        with issuer(tls=server_context(certificate(tmp_path))) as of_strangers:
            for url, told in (
                (idp.url.replace("http:", "https:"), "it does not speak TLS"),
                (of_strangers.url, "its certificate is not accepted: "),
                ("http://issuer.example/certs", "the name of its host is not known"),
                (f"http://127.0.0.1:{other.socket.getsockname()[1]}/", "it does not speak HTTP"),
            ):
                await KeySet(url, 600).run_once()
                assert f"url={url} known_keys=0 error={told}" in caplog.text
        nursery.cancel_scope.cancel()


async def test_keys_are_missing_until_they_came_once_and_old_when_they_could_not_be_refreshed_for_their_life(
    idp: Issuer,
) -> None:
    for ttl_secs, after_a_failure in ((600.0, KeysState.KNOWN), (0.0, KeysState.OLD)):
        keys = KeySet(idp.url, ttl_secs)
        states, instants = [keys.state], [keys.fetched_at]
        for status in (500, 200, 500, 200):
            idp.status = status
            await keys.run_once()
            states.append(keys.state)
            instants.append(keys.fetched_at)
        missing, known = KeysState.MISSING, KeysState.KNOWN
        assert states == [missing, missing, known, after_a_failure, known]
        assert instants[:2] == [0.0, 0.0]
        assert instants[2] == instants[3] == pytest.approx(time.time(), abs=60)
        assert keys.fetches == {"ok": 2, "failed": 2}


@pytest.mark.parametrize(
    ("url", "authorities", "told"),
    [
        (f"http://{'a' * 64}.example/certs", None, "error=Unicode"),  # UnicodeError, or since 3.13 a kind of it
        ("https://127.0.0.1:1/certs", "/nowhere/ca.pem", "authorities cannot be read: No such file"),
    ],
    ids=["a name that is none", "no authorities"],
)
async def test_what_cannot_even_be_asked_ends_no_server(
    url: str, authorities: str | None, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if authorities is not None:
        monkeypatch.setenv("SSL_CERT_FILE", authorities)
    keys = KeySet(url, 600)
    assert await keys.run_once() == jwks.RETRY_SECS[0]
    assert keys.failed
    assert told in caplog.text


@pytest.mark.parametrize(
    ("names", "by", "trusted"),
    [(("127.0.0.1",), "trusted", True), (("127.0.0.1",), "other", False), (("issuer.example",), "trusted", False)],
    ids=["the issuer's", "of another authority", "of another host"],
)
async def test_keys_are_taken_from_nobody_but_the_host_that_is_configured(
    names: tuple[str, ...],
    by: str,
    trusted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shown = certificate(tmp_path, *names, by=by)
    monkeypatch.setenv("SSL_CERT_FILE", certificate(tmp_path, called="ours").ca_file)
    with issuer(tls=server_context(shown)) as idp:
        keys = KeySet(idp.url, 600)
        await keys.run_once()
        assert keys.failed is not trusted
        assert bool(keys.keys) is trusted
        assert ("error=its certificate is not accepted" in caplog.text) is not trusted
        assert idp.served == int(trusted)


async def test_an_issuer_that_does_not_answer_is_given_up(idp: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "FETCH_SECS", 0.2)
    idp.is_held = True
    keys = KeySet(idp.url, 600)
    with trio.fail_after(20):
        assert await keys.run_once() == 1
    assert keys.failed


async def test_those_who_meet_an_unknown_key_share_one_fetch(idp: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 0.0)
    async with running(KeySet(idp.url, 600)) as keys:
        await keys.refetched()
        served = idp.served
        idp.document = key_set(public_jwk("rsa2"))
        idp.is_held = True
        async with trio.open_nursery() as waiting:
            for _ in range(20):
                waiting.start_soon(keys.refetched)
            await trio.testing.wait_all_tasks_blocked()
            assert ids(keys) == {"rsa1", "p256", "p384", "p521", "ed1"}
            idp.let_go.set()
        assert ids(keys) == {"rsa2"}
        assert idp.served == served + 1


async def test_one_who_leaves_does_not_end_the_fetch_of_the_others(
    idp: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 0.0)
    async with running(KeySet(idp.url, 600)) as keys:
        await keys.refetched()
        idp.document, idp.is_held = key_set(public_jwk("rsa2")), True
        async with trio.open_nursery() as waiting:
            with trio.move_on_after(0):
                await keys.refetched()
            waiting.start_soon(keys.refetched)
            await trio.testing.wait_all_tasks_blocked()
            idp.let_go.set()
        assert ids(keys) == {"rsa2"}


async def test_unknown_keys_are_asked_for_no_more_than_once_in_a_while(
    idp: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "REFETCH_SECS", 3600.0)
    async with running(KeySet(idp.url, 600)) as keys:
        await keys.refetched()
        served = idp.served
        for _ in range(50):
            await keys.refetched()
        assert idp.served == served


async def test_keys_are_fetched_anew_when_they_are_as_old_as_the_configuration_says(idp: Issuer) -> None:
    async with running(KeySet(idp.url, 0.05)) as keys:
        await keys.refetched()
        idp.document = key_set(public_jwk("rsa2"))
        while ids(keys) != {"rsa2"}:
            await trio.lowlevel.checkpoint()


def test_the_document_of_the_tests_is_as_an_issuer_writes_it(idp: Issuer) -> None:
    (first, *_) = json.loads(idp.document)["keys"]
    assert set(first) == {"kty", "n", "e", "kid", "use"}
