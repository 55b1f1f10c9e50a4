"""TLS towards participants: who is trusted, what is shown, and what a step is told when it cannot be spoken."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import trio

from rpc.settings import ServiceSettings, ServiceTls
from saga.ports import Answer, Outcome
from tests.rpc.calling import calling, step
from tests.support.certificates import certificate
from tests.support.participants import Codec, Flavour, Participant, participant

CODECS: tuple[Codec, Codec] = ("protobuf", "json")
"""With the first the participant is asked for its methods before it is called: two ways to connect."""
BOTH: tuple[Flavour, Flavour] = ("grpclib", "grpcio")


def settings(shop: Participant, tls: ServiceTls | None, codec: Codec | None = None) -> ServiceSettings:
    return ServiceSettings(host=shop.host, port=shop.port, codec=codec or shop.codec, tls=tls)


def done(answer: Answer) -> bool:
    return answer.outcome is Outcome.DONE and answer.response is not None and answer.response["ok"] is True


async def answer_of(services: dict[str, ServiceSettings], service: str = "shop") -> Answer:
    with trio.fail_after(20):
        async with calling(services) as caller:
            return await caller.call(step(service=service))


def told(answer: Answer) -> str:
    """The message of an attempt that was not made."""
    assert (answer.outcome, answer.code) == (Outcome.NOT_DONE, "UNAVAILABLE")
    assert answer.message is not None
    return answer.message


@pytest.mark.parametrize("flavour", BOTH)
async def test_a_participant_is_called_over_tls_if_its_authority_is_the_one_named(
    flavour: Flavour, tmp_path: Path
) -> None:
    shown, other = certificate(tmp_path), certificate(tmp_path, by="other", called="other")
    with participant(flavour, certificate=shown) as shop:
        assert done(await answer_of({"shop": settings(shop, ServiceTls(ca_file=shown.ca_file))}))
        for tls in (ServiceTls(ca_file=other.ca_file), ServiceTls()):
            message = told(await answer_of({"shop": settings(shop, tls)}))
            assert "TLS: its certificate is not accepted: unable to get local issuer certificate" in message
            assert f"127.0.0.1:{shop.port}" in message
        assert len(shop.calls()) == 1


@pytest.mark.parametrize("flavour", BOTH)
async def test_the_certificate_has_to_carry_the_host_or_the_name_that_is_configured(
    flavour: Flavour, tmp_path: Path
) -> None:
    shown = certificate(tmp_path, "shop.internal")
    with participant(flavour, certificate=shown) as shop:
        services = {
            "shop": settings(shop, ServiceTls(ca_file=shown.ca_file, server_name="shop.internal")),
            "wrong": settings(shop, ServiceTls(ca_file=shown.ca_file, server_name="stock.internal")),
            "host": settings(shop, ServiceTls(ca_file=shown.ca_file)),
        }
        assert done(await answer_of(services))
        assert "not valid for 'stock.internal'" in told(await answer_of(services, "wrong"))
        assert "not valid for '127.0.0.1'" in told(await answer_of(services, "host"))
        assert len(shop.calls()) == 1


async def test_an_expired_certificate_is_not_accepted(tmp_path: Path) -> None:
    shown = certificate(tmp_path, expired=True)
    with participant("grpclib", certificate=shown) as shop:
        for codec in CODECS:
            message = told(await answer_of({"shop": settings(shop, ServiceTls(ca_file=shown.ca_file), codec)}))
            assert "TLS: its certificate is not accepted: certificate has expired" in message
        assert shop.calls() == []


@pytest.mark.parametrize("flavour", BOTH)
async def test_a_participant_that_wants_a_certificate_is_shown_ours(flavour: Flavour, tmp_path: Path) -> None:
    shown = certificate(tmp_path)
    good, bad = certificate(tmp_path, called="good"), certificate(tmp_path, by="other", called="bad")
    with participant(flavour, certificate=shown, client_ca_file=shown.ca_file) as shop:
        ours = ServiceTls(ca_file=shown.ca_file, cert_file=good.cert_file, key_file=good.key_file)
        assert done(await answer_of({"shop": settings(shop, ours)}))
        none = ServiceTls(ca_file=shown.ca_file)
        not_theirs = ServiceTls(ca_file=shown.ca_file, cert_file=bad.cert_file, key_file=bad.key_file)
        for tls, codec in itertools.product((none, not_theirs), CODECS):
            message = told(await answer_of({"shop": settings(shop, tls, codec)}))
            assert f"127.0.0.1:{shop.port}" in message
            assert "closed the connection right after the TLS handshake" in message
            assert "certificate" in message
        assert len(shop.calls()) == 1


@pytest.mark.parametrize("flavour", BOTH)
async def test_a_participant_without_tls_is_not_spoken_to_in_the_clear(flavour: Flavour) -> None:
    with participant(flavour) as shop:
        for codec in CODECS:
            assert "TLS: it does not speak TLS" in told(await answer_of({"shop": settings(shop, ServiceTls(), codec)}))
        assert shop.calls() == []


async def test_a_participant_with_tls_that_is_called_without_is_not_done(tmp_path: Path) -> None:
    with participant("grpclib", certificate=certificate(tmp_path)) as shop:
        assert (await answer_of({"shop": settings(shop, None)})).outcome is Outcome.NOT_DONE
        assert shop.calls() == []


async def test_new_files_are_used_from_the_next_connection_on_and_bad_ones_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown, stranger = certificate(tmp_path), certificate(tmp_path, by="other", called="stranger")
    ca_file = tmp_path / "used-ca.pem"

    def replace(source: str | None) -> None:
        content = b"no certificate" if source is None else Path(source).read_bytes()
        new = tmp_path / "new.pem"
        new.write_bytes(content)
        os.replace(new, ca_file)

    replace(stranger.ca_file)
    with participant("grpclib", codec="json", certificate=shown) as shop:
        async with calling({"shop": settings(shop, ServiceTls(ca_file=str(ca_file)))}) as caller:
            assert "not accepted" in told(await caller.call(step()))
            replace(shown.ca_file)
            assert done(await caller.call(step()))
            shop.restart()
            replace(None)
            with trio.fail_after(10):
                # Until the end of the old connection is seen, a call on it is in doubt.
                while not done(await caller.call(step())):
                    pass
            assert "participant_tls_files_unusable" in caplog.text
