"""TLS towards Kafka's brokers, by the files of the time at which each connection is made."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

log = logging.getLogger("saga.store.kafka")


class TlsFiles:
    """Paths of PEM files and the context made of them. `ca_file` None: the system's roots; `cert_file` and `key_file`,
    together: what brokers that ask for a certificate are shown."""

    def __init__(self, ca_file: str | None, cert_file: str | None, key_file: str | None) -> None:
        """Raises OSError, as TLS's errors are too."""
        self._ca_file, self._cert_file, self._key_file = ca_file, cert_file, key_file
        self._contents = self._read()
        self._context = self._made()

    def context(self) -> ssl.SSLContext:
        """The context for a new connection. Files that cannot be used are logged, and those of before stay in use."""
        # Read before the context is made from them: a change in between is seen as one the next time.
        contents = self._read()
        if contents != self._contents:
            self._contents = contents
            try:
                self._context = self._made()
            except OSError as error:
                log.error("kafka_tls_files_unusable error=%s", error)
        return self._context

    def _read(self) -> list[bytes | None]:
        return [_content(file) for file in (self._ca_file, self._cert_file, self._key_file) if file is not None]

    def _made(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._ca_file)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._cert_file is not None:
            context.load_cert_chain(self._cert_file, self._key_file)
        return context


class RenewedContext(ssl.SSLContext):
    """What aiokafka takes for good, since it reconnects by itself: each handshake gets the context of its time."""

    _files: TlsFiles

    def __new__(cls, files: TlsFiles) -> RenewedContext:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        made._files = files
        return made

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        """What asyncio begins each handshake with."""
        return self._files.context().wrap_bio(*arguments, **named)


def _content(file: str) -> bytes | None:
    try:
        return Path(file).read_bytes()
    except OSError:
        return None
