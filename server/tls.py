"""TLS from files: the contexts of our own two doors, read anew when their files change, and what is wrong with any file
that the configuration names, in words a person can act on.

Contexts towards participants, Postgres and Kafka are made where they are used; here their files are looked at once,
before anything starts, so that a wrong path is not first noticed by a saga.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import trio
from cryptography import x509

from server.config import ClientAuth, Config, ServerTls

log = logging.getLogger("saga.server.tls")

RELOAD_SECS = 1.0
"""How often the files are looked at. A guess: they are a few kilobytes, and who replaces them expects no delay."""

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; HTTP/2 forbids the others there (RFC 9113, appendix A). TLS 1.3 has no bad ones."""

REST_PROTOCOLS = ("h2", "http/1.1")
GRPC_PROTOCOLS = ("h2",)


class TlsFilesInvalid(Exception):
    """Files that cannot be used. `problems`: one line each, with the configuration's key and the file's path."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def utc_now() -> datetime:
    """The wall clock, as certificates mean it."""
    return datetime.now(UTC)


class Shown(msgspec.Struct, frozen=True):
    """A certificate that this process shows to others: its file, and the time in which it is good."""

    file: str
    not_before: datetime
    not_after: datetime

    @classmethod
    def of(cls, file: str, content: bytes | None) -> Shown | None:
        """The first one of a file. None: there is none, or only OpenSSL, which is not as strict, can read it."""
        try:
            certificate = x509.load_pem_x509_certificates(content or b"")[0]
        except ValueError:
            return None
        return cls(file, certificate.not_valid_before_utc, certificate.not_valid_after_utc)

    def fault(self, now: datetime) -> str | None:
        """Why nobody accepts it, if so."""
        if now >= self.not_after:
            return f"expired at {self.not_after}"
        return f"not valid before {self.not_before}" if now < self.not_before else None


class ServerContexts:
    """The TLS contexts of the doors. A connection gets the one of its time; those before it keep theirs.

    `shown`: the certificate in use; None: it cannot be told.
    """

    def __init__(self, settings: ServerTls, *, now: Callable[[], datetime] = utc_now) -> None:
        """Raises `TlsFilesInvalid`."""
        self._settings = settings
        self._now = now
        self._is_held_back = False
        self._contents = self._read()
        self.shown = self._found()
        self._rest, self._grpc = self._made()

    def rest(self) -> ssl.SSLContext:
        """For a new connection of the REST door."""
        return self._rest

    def grpc(self) -> ssl.SSLContext:
        """For a new connection of the gRPC door."""
        return self._grpc

    async def run(self) -> None:
        """Looks at the files for ever."""
        while True:
            await trio.sleep(RELOAD_SECS)
            await trio.to_thread.run_sync(self.reload_if_changed)

    def reload_if_changed(self) -> bool:
        """Whether the files are other ones than before and can be used. If they cannot, what was there stays in use:
        whoever replaces a certificate and then its key passes through such a moment, whoever errs has to be told.
        A certificate outside its time does not replace one that is good; it is looked at again until it does."""
        # Read before the contexts are made from them: a change in between is seen as one the next time.
        contents = self._read()
        is_news = contents != self._contents
        if not is_news and not self._is_held_back:
            return False
        self._contents = contents
        found = self._found()
        fault = self._fault_beside_a_good_one(found)
        self._is_held_back = fault is not None
        try:
            if fault is not None:
                raise TlsFilesInvalid((f"server.tls.cert_file: {self._settings.cert_file}: {fault}",))
            self._rest, self._grpc = self._made()
        except TlsFilesInvalid as error:
            if is_news:
                log.error("tls_files_unusable in_use=%s error=%s", "the certificate of before", error)
            return False
        self.shown = found
        if self._settings.client_ca_file is not None:
            _warn_if_out_of_time("server.tls.client_ca_file", self._settings.client_ca_file)
        log.info("tls_reloaded cert_file=%s", self._settings.cert_file)
        return True

    def _read(self) -> list[bytes | None]:
        settings = self._settings
        return [_content(file) for file in (settings.cert_file, settings.key_file, settings.client_ca_file) if file]

    def _found(self) -> Shown | None:
        return Shown.of(self._settings.cert_file, self._contents[0])

    def _fault_beside_a_good_one(self, found: Shown | None) -> str | None:
        now = self._now()
        in_use_is_good = self.shown is not None and self.shown.fault(now) is None
        return found.fault(now) if found is not None and in_use_is_good else None

    def _made(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        return _server_context(self._settings, REST_PROTOCOLS), _server_context(self._settings, GRPC_PROTOCOLS)


def _content(file: str) -> bytes | None:
    try:
        return Path(file).read_bytes()
    except OSError:
        return None


def _server_context(settings: ServerTls, protocols: Sequence[str]) -> ssl.SSLContext:
    problems = _server_problems(settings)
    if problems:
        raise TlsFilesInvalid(problems)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client could have us do the expensive part of a handshake again and again on one connection.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(protocols)
    try:
        context.load_cert_chain(settings.cert_file, settings.key_file, _no_passphrase)
        if settings.client_ca_file is not None:
            context.load_verify_locations(cafile=settings.client_ca_file)
            required = settings.client_auth is ClientAuth.REQUIRED
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    except (OSError, ValueError) as error:  # replaced since it was looked at
        raise TlsFilesInvalid((f"server.tls: {error}",)) from error
    return context


# --- looking at files ------------------------------------------------------------------------------------------------


def file_problems(config: Config) -> list[str]:
    """What is wrong with the files of certificates and keys that the configuration names: one line each, by its key.
    An authority outside its time is logged only: clocks differ. Certificates that are shown: see `CertificateEnds`."""
    problems: list[str] = []
    if config.server.tls is not None:
        problems += _server_problems(config.server.tls)
    for name, service in config.services.items():
        if service.tls is not None:
            tls = service.tls
            problems += _client_problems(f"services.{name}.tls.", ("ca_file", "cert_file", "key_file"), tls)
    if config.database is not None:
        problems += _client_problems("database.", ("ssl_root_cert", "ssl_cert", "ssl_key"), config.database)
    if config.kafka is not None:
        problems += _client_problems("kafka.tls.", ("ca_file", "cert_file", "key_file"), config.kafka.tls)
    for key, file in _authorities(config).items():
        if file is not None:
            _warn_if_out_of_time(key, file)
    return problems


def _authorities(config: Config) -> dict[str, str | None]:
    """The files of those whom we trust, by their keys."""
    files = {f"services.{name}.tls.ca_file": each.tls.ca_file for name, each in config.services.items() if each.tls}
    if config.server.tls is not None:
        files["server.tls.client_ca_file"] = config.server.tls.client_ca_file
    if config.database is not None:
        files["database.ssl_root_cert"] = config.database.ssl_root_cert
    if config.kafka is not None:
        files["kafka.tls.ca_file"] = config.kafka.tls.ca_file
    return files


def _server_problems(tls: ServerTls) -> list[str]:
    problems = _pair_problems("server.tls.cert_file", tls.cert_file, "server.tls.key_file", tls.key_file)
    if tls.client_ca_file is not None:
        problems += _ca_problems("server.tls.client_ca_file", tls.client_ca_file)
    return problems


def _client_problems(prefix: str, keys: tuple[str, str, str], section: object) -> list[str]:
    """`keys`: what the section calls the file of the authorities, of our certificate, and of its key."""
    (ca_key, cert_key, key_key), (ca_file, cert_file, key_file) = keys, [getattr(section, key) for key in keys]
    problems = [] if ca_file is None else _ca_problems(prefix + ca_key, ca_file)
    if cert_file is not None and key_file is not None:
        problems += _pair_problems(prefix + cert_key, cert_file, prefix + key_key, key_file)
    return problems


def _pair_problems(cert_key: str, cert_file: str, key_key: str, key_file: str) -> list[str]:
    problems = []
    wanted = "expected a PEM file with a certificate, and those that link it to its authority"
    problems += _unread(cert_key, cert_file, b"-----BEGIN CERTIFICATE-----", wanted)
    problems += _unread(key_key, key_file, b"PRIVATE KEY-----", "expected a PEM file with a private key")
    if problems:
        return problems
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, _no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return [f"{key_key}: {key_file}: is not the key of the certificate in {cert_file}"]
        # OpenSSL does not say which of the two it is about, and of a broken one only that it is.
        return [f"{cert_key}: {cert_file}, {key_file}: expected a certificate and its key in PEM: {_reason(error)}"]
    except ValueError as error:
        return [f"{key_key}: {key_file}: {error}"]
    except OSError as error:  # removed since it was looked at
        return [f"{cert_key}: {cert_file}, {key_file}: cannot be read: {error.strerror}"]
    return []


def _ca_problems(key: str, file: str) -> list[str]:
    wanted = "expected a PEM file of certificates"
    problems = _unread(key, file, b"-----BEGIN ", wanted)
    if not problems:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
        except ssl.SSLError as error:
            return [f"{key}: {file}: {wanted}: {_reason(error)}"]
        except OSError as error:
            return [f"{key}: {file}: cannot be read: {error.strerror}"]
    return problems


def _unread(key: str, file: str, mark: bytes, wanted: str) -> list[str]:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        return [f"{key}: {file}: cannot be read: {error.strerror}; {wanted}"]
    return [] if mark in content else [f"{key}: {file}: {wanted}"]


def _no_passphrase() -> str:
    """Without it OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted; expected one without a passphrase")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


def _warn_if_out_of_time(key: str, file: str) -> None:
    """Of the file of an authority, so that whoever is refused because of it is not looked for elsewhere."""
    authority = Shown.of(file, _content(file))
    fault = None if authority is None else authority.fault(utc_now())
    if fault is not None:
        log.warning("tls_authority_out_of_time key=%s file=%s error=%s", key, file, fault)
