"""Certificates for tests that speak TLS: one authority for the session, another nobody trusts, and what they sign."""

from __future__ import annotations

import functools
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import trustme


class Certificate(msgspec.Struct, frozen=True):
    """Paths of PEM files. `ca_file`: who signed it."""

    cert_file: str
    key_file: str
    ca_file: str


@functools.cache
def authority(name: str = "trusted") -> trustme.CA:
    """The authority of that name; made once, since its key takes a while."""
    return trustme.CA(organization_name=f"{name} authority", key_type=trustme.KeyType.ECDSA)


def certificate(
    folder: Path,
    *names: str,
    common_name: str | None = None,
    by: str = "trusted",
    expired: bool = False,
    begins_in: timedelta = timedelta(days=-10),
    ends_in: timedelta = timedelta(days=10),
    called: str = "server",
) -> Certificate:
    """A certificate for `names` (localhost and 127.0.0.1, if there are none), in files of `folder` whose names begin
    with `called`. Written again, it is another one in the same files."""
    now = datetime.now(UTC)
    issued = authority(by).issue_cert(
        *(names or ("localhost", "127.0.0.1")),
        common_name=common_name,
        not_before=now + begins_in,
        not_after=now - timedelta(days=1) if expired else now + ends_in,
        key_type=trustme.KeyType.ECDSA,
    )
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificate(*(str(folder / f"{called}-{part}.pem") for part in ("cert", "key", "ca")))
    Path(made.cert_file).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    Path(made.key_file).write_bytes(issued.private_key_pem.bytes())
    Path(made.ca_file).write_bytes(authority(by).cert_pem.bytes())
    return made


def server_context(made: Certificate, *, client_ca_file: str | None = None) -> ssl.SSLContext:
    """For a server that speaks HTTP/2; with `client_ca_file` it wants certificates from its clients."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made.cert_file, made.key_file)
    context.set_alpn_protocols(["h2"])
    if client_ca_file is not None:
        context.load_verify_locations(client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca_file: str, *protocols: str, shown: Certificate | None = None) -> ssl.SSLContext:
    """For a client that trusts `ca_file`, offers `protocols` and shows a certificate, if it is given one."""
    context = ssl.create_default_context(cafile=ca_file)
    if protocols:
        context.set_alpn_protocols(protocols)
    if shown is not None:
        context.load_cert_chain(shown.cert_file, shown.key_file)
    return context
