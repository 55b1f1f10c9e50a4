"""Brokers that speak TLS, ask for certificates and for passwords."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from bridge import open_loop
from store.kafka import KafkaPublisher, KafkaSettings
from store.outbox import Acknowledged, BrokerAway
from tests.kafka.test_publisher import messages_to, unsent
from tests.support.certificates import Certificate, authority, certificate
from tests.support.kafka import MockBroker, reader
from tests.support.kafka_tls import TlsProxy, tls_proxy
from tests.support.server_process import server_process

USERS = {"saga": "s3cret"}
LOGIN = {"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", "username": "saga", "password": "s3cret"}


def server_context(folder: Path, *, wants_certificates: bool = False, **more: Any) -> ssl.SSLContext:
    made = certificate(folder, **more)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made.cert_file, made.key_file)
    if wants_certificates:
        context.load_verify_locations(made.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def publish(proxy: TlsProxy, broker: MockBroker, **settings: Any) -> None:
    """Sends three messages and finds them at the broker."""
    topic = broker.topic(1)
    messages, outcomes = messages_to(topic, 3), unsent(3)
    async with open_loop():
        publisher = KafkaPublisher(KafkaSettings(brokers=(proxy.bootstrap,), **settings), client_id="test")
        try:
            with trio.fail_after(60):
                await publisher.connect()
                await publisher.publish(messages, outcomes)
                await publisher.check()
        finally:
            await publisher.aclose()
    assert outcomes == [Acknowledged()] * 3
    with reader(broker, topic) as read:
        assert sorted(one.value["number"] for one in read.until(3)) == [0, 1, 2]


async def turned_away(proxy: TlsProxy, **settings: Any) -> str:
    async with open_loop():
        publisher = KafkaPublisher(KafkaSettings(brokers=(proxy.bootstrap,), **settings), client_id="test")
        try:
            with trio.fail_after(60), pytest.raises(BrokerAway) as caught:
                await publisher.connect()
        finally:
            await publisher.aclose()
    return str(caught.value)


async def test_events_reach_a_broker_over_tls_that_is_verified(mock_broker: MockBroker, tmp_path: Path) -> None:
    with tls_proxy(mock_broker.bootstrap, server_context(tmp_path)) as proxy:
        trusted, stranger = certificate(tmp_path).ca_file, certificate(tmp_path, by="other", called="other").ca_file
        await publish(proxy, mock_broker, security_protocol="SSL", ca_file=trusted)
        message = await turned_away(proxy, security_protocol="SSL", ca_file=stranger)
        assert "certificate verify failed" in message.lower().replace("_", " ")
        await turned_away(proxy, security_protocol="SSL")
        await turned_away(proxy, security_protocol="PLAINTEXT")


async def test_a_broker_that_wants_a_certificate_is_shown_ours(mock_broker: MockBroker, tmp_path: Path) -> None:
    with tls_proxy(mock_broker.bootstrap, server_context(tmp_path, wants_certificates=True)) as proxy:
        ours = certificate(tmp_path, "saga", called="ours")
        files = {"ca_file": ours.ca_file, "cert_file": ours.cert_file, "key_file": ours.key_file}
        await publish(proxy, mock_broker, security_protocol="SSL", **files)
        await turned_away(proxy, security_protocol="SSL", ca_file=ours.ca_file)


async def test_new_files_are_used_from_the_next_connection_on_and_bad_ones_are_not(
    mock_broker: MockBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def renew() -> tuple[Certificate, bytes]:
        made = certificate(tmp_path, "saga", called="ours")
        first, _, _ = Path(made.cert_file).read_text().partition("-----END CERTIFICATE-----")
        return made, ssl.PEM_cert_to_DER_cert(f"{first}-----END CERTIFICATE-----")

    def spoil(made: Certificate) -> None:
        Path(made.cert_file).write_text("none")
        Path(made.key_file).unlink()

    with tls_proxy(mock_broker.bootstrap, server_context(tmp_path, wants_certificates=True)) as proxy:
        ours, before = renew()
        files = {"ca_file": ours.ca_file, "cert_file": ours.cert_file, "key_file": ours.key_file}
        settings = KafkaSettings(brokers=(proxy.bootstrap,), security_protocol="SSL", **files)
        async with open_loop():
            publisher = KafkaPublisher(settings, client_id="test")

            async def shown_now() -> bytes | None:
                with trio.fail_after(60):
                    await publisher.aclose()
                    await publisher.connect()
                return proxy.shown[-1]

            try:
                assert await shown_now() == before
                _, after = renew()
                assert await shown_now() == after
                spoil(ours)
                assert await shown_now() == after
                assert "kafka_tls_files_unusable" in caplog.text
                # An authority that is taken back is not trusted any more.
                certificate(tmp_path, "saga", called="ours")
                authority("other").cert_pem.write_to_path(ours.ca_file)
                with pytest.raises(BrokerAway):
                    await shown_now()
            finally:
                await publisher.aclose()


async def test_a_password_is_given_over_tls_only_to_a_broker_that_is_verified(
    mock_broker: MockBroker, tmp_path: Path
) -> None:
    with tls_proxy(mock_broker.bootstrap, server_context(tmp_path), USERS) as proxy:
        trusted, stranger = certificate(tmp_path).ca_file, certificate(tmp_path, by="other", called="other").ca_file
        await publish(proxy, mock_broker, ca_file=trusted, **LOGIN)
        logins = len(proxy.logins)
        assert logins >= 1
        message = await turned_away(proxy, ca_file=trusted, **(LOGIN | {"password": "wr0ng"}))
        assert "wr0ng" not in message
        await turned_away(proxy, ca_file=stranger, **LOGIN)
        await turned_away(proxy, ca_file=trusted, security_protocol="SSL")
        assert len(proxy.logins) == logins


def test_the_server_reaches_its_broker_as_configured(mock_broker: MockBroker, tmp_path: Path) -> None:
    with tls_proxy(mock_broker.bootstrap, server_context(tmp_path, wants_certificates=True), USERS) as proxy:
        ours = certificate(tmp_path, "saga", called="ours")
        kafka = {
            "brokers": [proxy.bootstrap],
            "security_protocol": "SASL_SSL",
            "sasl": {"username": "saga", "password": USERS["saga"]},
            "tls": {"ca_file": ours.ca_file, "cert_file": ours.cert_file, "key_file": ours.key_file},
            "topics": {"publish": mock_broker.topic(1)},
        }
        with server_process(tmp_path, {"kafka": kafka}) as server:
            server.start()
            give_up_at = time.monotonic() + 30
            while server.call("GET", "/readyz")[1]["checks"]["kafka"] != "ok":
                assert time.monotonic() < give_up_at, server.log
                time.sleep(0.02)  # a process of its own: nothing to wait on but its answer
            assert USERS["saga"] not in server.log
