"""An issuer of tokens: its keys, made once a session, the tokens it signs, and its key set over real HTTP.

with issuer() as idp:
    idp.url, idp.token(roles=["sys_operator"])
    idp.document = b"garbage"; idp.status = 500; idp.is_held = True (answers when `let_go` is set)
"""

from __future__ import annotations

import base64
import functools
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

ISSUER = "https://issuer.example/realms/main"
AUDIENCE = "saga"
KEY_SET_PATH = "/realms/main/certs"

_CURVES: dict[str, ec.EllipticCurve] = {
    "p256": ec.SECP256R1(),
    "p384": ec.SECP384R1(),
    "p521": ec.SECP521R1(),
    "k256": ec.SECP256K1(),
}


@functools.cache
def private_key(name: str) -> Any:
    """The key of that name: `rsa...` (`rsa1024...` for a weak one), `p256...`, `p384...`, `p521`, `k256`, `ed...`."""
    if name.startswith("rsa"):
        return rsa.generate_private_key(65537, 1024 if name.startswith("rsa1024") else 2048)
    if name.startswith("ed"):
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(_CURVES[name[:4]])


def default_algorithm(name: str) -> str:
    if name.startswith("rsa"):
        return "RS256"
    return "EdDSA" if name.startswith("ed") else f"ES{ {'p256': 256, 'p384': 384, 'p521': 512}.get(name[:4], '256K') }"


def public_jwk(name: str, **more: Any) -> dict[str, Any]:
    """The public half as an issuer lists it; `more` replaces members, None leaves one out."""
    algorithm = get_default_algorithms()[default_algorithm(name)]
    jwk = dict(algorithm.to_jwk(private_key(name).public_key(), as_dict=True))
    jwk.pop("key_ops", None)
    members = {**jwk, "kid": name, "use": "sig", **more}
    return {member: value for member, value in members.items() if value is not None}


def private_jwk(name: str) -> dict[str, Any]:
    """Both halves, as no issuer should list them."""
    algorithm = get_default_algorithms()[default_algorithm(name)]
    return {**algorithm.to_jwk(private_key(name), as_dict=True), "kid": name, "use": "sig", "key_ops": ["verify"]}


def key_set(*keys: Any) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


def segment(data: bytes | Mapping[str, Any]) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(header: bytes | Mapping[str, Any], payload: bytes | Mapping[str, Any], key: str, algorithm: str) -> str:
    """A token of exactly these parts, signed by the key of that name."""
    signing_input = f"{segment(header)}.{segment(payload)}"
    made = get_default_algorithms()[algorithm].sign(signing_input.encode(), private_key(key))
    return f"{signing_input}.{segment(made)}"


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good token of nobody in particular; `changes` replaces claims, None leaves one out."""
    good = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "exp": int(time.time()) + 3600,
        "iat": int(time.time()),
        "realm_access": {"roles": ["offline_access", "sys_admin"]},
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def token(
    key: str = "rsa1", algorithm: str | None = None, header: Mapping[str, Any] | None = None, **changes: Any
) -> str:
    """A good token but for what is said. `header` replaces members of the header, None leaves one out."""
    algorithm = algorithm or default_algorithm(key)
    members = {"alg": algorithm, "kid": key, "typ": "JWT", **(header or {})}
    members = {name: value for name, value in members.items() if value is not None}
    return signed(members, claims(**changes), key, algorithm)


def token_of(*roles: str, **changes: Any) -> str:
    """A good token of somebody with these roles of the realm."""
    return token(realm_access={"roles": list(roles)}, **changes)


class Issuer:
    """The key set's server. `served` counts the requests for it."""

    def __init__(self, port: int, scheme: str = "http") -> None:
        self.url = f"{scheme}://127.0.0.1:{port}{KEY_SET_PATH}"
        self.document = key_set(*(public_jwk(name) for name in ("rsa1", "p256", "p384", "p521", "ed1")))
        self.status = 200
        self.headers: dict[str, str] = {}
        self.is_held = False
        self.let_go = threading.Event()
        self.asked = threading.Event()
        self.served = 0

    def settings(self, **more: Any) -> dict[str, Any]:
        """The `auth` section for it."""
        return {"jwks_url": self.url, "issuer": ISSUER, "audience": AUDIENCE, **more}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    issuer: Issuer


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        issuer = cast(_Server, self.server).issuer
        issuer.served += 1
        issuer.asked.set()
        if issuer.is_held:
            issuer.let_go.wait(60)
        try:
            self.send_response(issuer.status)
            self.send_header("Content-Length", str(len(issuer.document)))
            for name, value in issuer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(issuer.document)
        except OSError:
            self.close_connection = True  # whoever asked has had enough

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests tell what they see."""


@contextmanager
def issuer(port: int = 0, *, tls: ssl.SSLContext | None = None) -> Iterator[Issuer]:
    """A key set with an RSA key, three curves and Ed25519, served while the block lasts; with `tls`, over it."""
    server = _Server(("127.0.0.1", port), _Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    serving = server.issuer = Issuer(server.server_address[1], "http" if tls is None else "https")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield serving
    finally:
        serving.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
