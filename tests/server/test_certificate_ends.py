"""When certificates end: what is told of those that this process shows, and how often."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from rpc.settings import ServiceSettings, ServiceTls
from server.certificate_ends import CertificateEnds, shown_certificates
from server.config import Config, DatabaseConfig, KafkaConfig, KafkaTls, ServerConfig, ServerTls
from server.tls import ServerContexts
from tests.support.certificates import Certificate, certificate


def ending(folder: Path, days: float, called: str = "server") -> Certificate:
    return certificate(folder, ends_in=timedelta(days=days), called=called)


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Levels and events since the last time."""
    found = [(record.levelno, record.getMessage().split(" at=")[0]) for record in caplog.records]
    caplog.clear()
    return found


def test_every_certificate_that_is_shown_is_told_of_by_the_section_that_names_it(tmp_path: Path) -> None:
    own, shop, database, kafka = (ending(tmp_path, days, str(days)) for days in (1, 2, 3, 4))
    config = Config(
        server=ServerConfig(tls=ServerTls(cert_file=own.cert_file, key_file=own.key_file)),
        services={
            "shop": ServiceSettings(host="h", port=1, tls=ServiceTls(cert_file=shop.cert_file, key_file=shop.key_file)),
            "bare": ServiceSettings(host="h", port=1, tls=ServiceTls()),
            "clear": ServiceSettings(host="h", port=1),
        },
        database=DatabaseConfig(name="n", user="u", ssl_cert=database.cert_file, ssl_key=database.key_file),
        kafka=KafkaConfig(brokers=("k:1",), tls=KafkaTls(cert_file=kafka.cert_file, key_file=kafka.key_file)),
    )
    assert config.server.tls is not None
    ends = CertificateEnds(shown_certificates(config, ServerContexts(config.server.tls)))
    assert ends.timestamps == {}
    ends.look()
    now = datetime.now(UTC).timestamp()
    days = {use: (at - now) / 86400 for use, at in ends.timestamps.items()}
    assert days == pytest.approx({"server": 1, "services.shop": 2, "database": 3, "kafka": 4}, abs=0.01)
    assert shown_certificates(Config(), None) == {}


def test_an_end_is_told_a_week_before_when_it_comes_and_once_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made, start = ending(tmp_path, 8), datetime.now(UTC)
    at = start
    config = Config(
        services={
            "shop": ServiceSettings(host="h", port=1, tls=ServiceTls(cert_file=made.cert_file, key_file=made.key_file))
        }
    )
    ends = CertificateEnds(shown_certificates(config, None), now=lambda: at)

    def told_from(first_day: float, last_day: float) -> list[tuple[int, str]]:
        """Of looks at every hour between."""
        nonlocal at
        for hour in range(int(first_day * 24), int(last_day * 24)):
            at = start + timedelta(hours=hour)
            ends.look()
        return told(caplog)

    where = f"use=services.shop file={made.cert_file}"
    assert told_from(0, 1) == []
    assert told_from(1, 4) == [(logging.WARNING, f"tls_certificate_ends_soon {where}")] * 3
    # Told on its last day by then, and again at its end.
    assert told_from(7, 9) == [
        (logging.WARNING, f"tls_certificate_ends_soon {where}"),
        (logging.ERROR, f"tls_certificate_expired {where}"),
    ]
    Path(made.cert_file).write_text("half a fi")  # the one before is still shown
    assert told_from(9, 10) == [(logging.ERROR, f"tls_certificate_expired {where}")]
    assert ends.timestamps["services.shop"] < at.timestamp()
    certificate(tmp_path, ends_in=timedelta(days=100))
    assert told_from(10, 11) == []
    certificate(tmp_path, begins_in=timedelta(days=20), ends_in=timedelta(days=100))
    assert told_from(11, 12) == [(logging.WARNING, f"tls_certificate_not_yet_valid {where}")]


async def test_a_start_with_a_certificate_that_has_expired_is_told_before_the_doors_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = certificate(tmp_path, expired=True)
    tls = ServerTls(cert_file=made.cert_file, key_file=made.key_file)
    ends = CertificateEnds(shown_certificates(Config(server=ServerConfig(tls=tls)), ServerContexts(tls)))
    async with trio.open_nursery() as nursery:
        await nursery.start(ends.run)
        assert told(caplog) == [(logging.ERROR, f"tls_certificate_expired use=server file={made.cert_file}")]
        nursery.cancel_scope.cancel()
