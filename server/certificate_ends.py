"""When the certificates that this process shows to others end: for the metrics, and in the log before it is too late.

Authorities are not here: what is held against them fails by itself, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import msgspec
import trio

from server.config import Config
from server.tls import ServerContexts, Shown, utc_now

log = logging.getLogger("saga.server.tls")

LOOK_SECS = 10.0
"""How often the files are read. A guess: they are a few kilobytes, and whoever replaced one wants to see it."""
SOON = timedelta(days=7)
"""From then on the log says so. Whoever renews by a machine does it long before."""
AGAIN = timedelta(days=1)
"""How often it is said."""

Source = Callable[[], Shown | None]
"""The certificate that is shown now; None: it cannot be read, so the one before is."""


Warn = Callable[[str, Shown], None]
"""Logs one thing about the certificate of a use."""


class _Told(msgspec.Struct, frozen=True):
    tell: Warn
    shown: Shown
    at: datetime


def shown_certificates(config: Config, contexts: ServerContexts | None) -> dict[str, Source]:
    """Those that a configuration has this process show, by the section that names them (`server`, `services.shop`,
    `database`, `kafka`)."""
    sources: dict[str, Source] = {}
    if contexts is not None:
        sources["server"] = lambda: contexts.shown
    files = {f"services.{name}": each.tls.cert_file for name, each in config.services.items() if each.tls}
    if config.database is not None:
        files["database"] = config.database.ssl_cert
    if config.kafka is not None:
        files["kafka"] = config.kafka.tls.cert_file
    return sources | {use: partial(_read, file) for use, file in files.items() if file}


def _read(file: str) -> Shown | None:
    try:
        return Shown.of(file, Path(file).read_bytes())
    except OSError:
        return None


class CertificateEnds:
    """Looks at each certificate now and then. `timestamps`: by use, when the one that is shown ends, in seconds since
    1970, as of the last look."""

    def __init__(self, sources: Mapping[str, Source], *, now: Callable[[], datetime] = utc_now) -> None:
        self._sources = sources
        self._now = now
        self._told: dict[str, _Told] = {}
        self._shown: dict[str, Shown] = {}
        self.timestamps: dict[str, float] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Looks for ever; started when it has looked once."""
        await trio.to_thread.run_sync(self.look)
        task_status.started()
        while True:
            await trio.sleep(LOOK_SECS)
            await trio.to_thread.run_sync(self.look)

    def look(self) -> None:
        """Reads the files; logs what has ended, will within `SOON` or has not begun: once a day, and each change."""
        for use, source in self._sources.items():
            shown = source()
            if shown is not None:
                self._shown[use] = shown
        # Replaced as a whole: a scrape reads it while this runs in a thread.
        self.timestamps = {use: shown.not_after.timestamp() for use, shown in self._shown.items()}
        now = self._now()
        for use, shown in self._shown.items():
            self._tell_if_due(use, shown, now)

    def _tell_if_due(self, use: str, shown: Shown, now: datetime) -> None:
        tell = _warning_of(shown, now)
        before = self._told.get(use)
        if tell is None:
            self._told.pop(use, None)
        elif before is None or (before.tell, before.shown) != (tell, shown) or now >= before.at + AGAIN:
            self._told[use] = _Told(tell, shown, now)
            tell(use, shown)


def _warning_of(shown: Shown, now: datetime) -> Warn | None:
    """What is to be said of a certificate now; None: all is well."""
    if now >= shown.not_after:
        return _tell_expired
    if now < shown.not_before:
        return _tell_not_yet_valid
    return _tell_ends_soon if now >= shown.not_after - SOON else None


def _tell_expired(use: str, shown: Shown) -> None:
    log.error("tls_certificate_expired use=%s file=%s at=%s", use, shown.file, shown.not_after)


def _tell_not_yet_valid(use: str, shown: Shown) -> None:
    log.warning("tls_certificate_not_yet_valid use=%s file=%s at=%s", use, shown.file, shown.not_before)


def _tell_ends_soon(use: str, shown: Shown) -> None:
    log.warning("tls_certificate_ends_soon use=%s file=%s at=%s", use, shown.file, shown.not_after)
