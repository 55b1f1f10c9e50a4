"""`saga health`: asks the server of a configuration, over its REST port, whether it is alive, as an image's HEALTHCHECK
and probes that are commands do. No server runs here."""

from __future__ import annotations

import http.client
import ssl
from contextlib import closing, suppress

import msgspec

from server.config import ClientAuth, ServerConfig, ServerTls

ANSWER_SECS = 2.0
"""How long connecting, the handshake and the answer may take, each. A guess: the server is on this machine."""

OF_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Where a server that listens everywhere is asked."""


class Health(msgspec.Struct, frozen=True):
    """What came of asking `url`. `told`: the answer, or why there is none."""

    url: str
    healthy: bool
    told: str


def ask(server: ServerConfig, *, ready: bool) -> Health:
    """Asks `/readyz` (`ready`) or `/healthz`; never raises."""
    host = OF_EVERY_ADDRESS.get(server.host, server.host)
    path = "/readyz" if ready else "/healthz"
    named = f"[{host}]" if ":" in host else host
    url = f"{'http' if server.tls is None else 'https'}://{named}:{server.port}{path}"
    if server.port == 0:
        return Health(url, False, "server.port is 0: which port it took is not known here")
    try:
        status, told = _answer(server, host, path)
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: a host that no name can be
        reason = error.strerror if isinstance(error, OSError) else None
        return Health(url, False, reason or str(error) or type(error).__name__)
    return Health(url, status == http.HTTPStatus.OK, told)


def _answer(server: ServerConfig, host: str, path: str) -> tuple[int, str]:
    """Status and body. Raises `OSError`, as TLS's errors are too, and `http.client.HTTPException`."""
    if server.tls is None:
        connection = http.client.HTTPConnection(host, server.port, timeout=ANSWER_SECS)
    else:
        context = _tls_context(server.tls)
        connection = http.client.HTTPSConnection(host, server.port, timeout=ANSWER_SECS, context=context)
    with closing(connection):
        connection.connect()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (ssl.SSLError, ConnectionError):
            if path == "/healthz" and server.tls is not None and server.tls.client_auth is ClientAuth.REQUIRED:
                # A dead one would not have shaken hands. What its alert says may be lost with the connection.
                return http.HTTPStatus.OK, "alive; it does not take its own certificate as a client's"
            raise


def _tls_context(tls: ServerTls) -> ssl.SSLContext:
    """For asking ourselves: nothing is verified, since no secret is sent and the certificate is for another name. Where
    clients have to show one, that is shown; whether it is taken is up to its authority and what it may be used for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # In it the handshake is over, for the client, before its certificate is looked at.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if tls.client_ca_file is not None and tls.client_auth is ClientAuth.REQUIRED:
        with suppress(OSError):  # files that are being replaced: the server has those of before
            context.load_cert_chain(tls.cert_file, tls.key_file, str)
    return context
