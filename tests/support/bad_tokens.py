"""Every way we know of to ask without a right to: by name, what `Authorization` says and the code it is refused with.

Made for the issuer of `issuer.py`. `None`: the header is not sent; a list: it is sent so many times.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.issuer import AUDIENCE, ISSUER, claims, private_key, public_jwk, segment, signed, token, token_of

Authorization = str | list[str] | None

MISSING = "SYS_AUTH_MISSING_TOKEN"
INVALID = "SYS_AUTH_TOKEN_INVALID"
EXPIRED = "SYS_AUTH_TOKEN_EXPIRED"
DENIED = "SYS_AUTH_PERMISSION_DENIED"


def with_mac(secret: bytes, algorithm: str = "HS256", **header: Any) -> str:
    """A token whose signature is a MAC with `secret`, as one that takes a public key for a secret would make."""
    signing_input = f"{segment({'alg': algorithm, 'kid': 'rsa1', 'typ': 'JWT', **header})}.{segment(claims())}"
    digest = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}[algorithm]
    return f"{signing_input}.{segment(hmac.digest(secret, signing_input.encode(), digest))}"


def unsigned(algorithm: str, signature: str = "") -> str:
    return f"{segment({'alg': algorithm, 'typ': 'JWT'})}.{segment(claims())}.{signature}"


def bad_tokens() -> dict[str, tuple[Authorization, str]]:
    """The table."""
    good = token()
    head, body, signature = good.split(".")
    rsa_header = {"alg": "RS256", "kid": "rsa1", "typ": "JWT"}
    public = private_key("rsa1").public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    now = int(time.time())
    # -- how it is sent
    sent: dict[str, tuple[Authorization, str]] = {
        "no header": (None, MISSING),
        "an empty header": ("", INVALID),
        "the scheme alone": ("Bearer", INVALID),
        "a lower-case scheme": (f"bearer {good}", INVALID),
        "an upper-case scheme": (f"BEARER {good}", INVALID),
        "no scheme": (good, INVALID),
        "another scheme": ("Basic YWxpY2U6c2VjcmV0", INVALID),
        "a token under another scheme": (f"DPoP {good}", INVALID),
        "a colon after the scheme": (f"Bearer: {good}", INVALID),
        "two spaces": (f"Bearer  {good}", INVALID),
        "the scheme twice": (f"Bearer Bearer {good}", INVALID),
        "a word after the token": (f"Bearer {good} x", INVALID),
        "two in one header": (f"Bearer {good}, Bearer {good}", INVALID),
        "a parameter": (f'Bearer token="{good}"', INVALID),
        "a duplicated header": ([f"Bearer {good}", f"Bearer {good}"], INVALID),
        "a duplicated header, the second bad": ([f"Bearer {good}", "Bearer x"], INVALID),
        "a duplicated header, the first another scheme": (["Basic YTpi", f"Bearer {good}"], INVALID),
    }
    # -- what has no form
    malformed = {
        "garbage": "garbage",
        "three words": "a.b.c",
        "dots alone": "..",
        "two parts": f"{head}.{body}",
        "four parts": f"{good}.{signature}",
        "five parts, as an encrypted one": f"{head}.{body}.{body}.{body}.{signature}",
        "a signature cut short": good[:-10],
        "no signature": f"{head}.{body}.",
        "a signature of zeros": f"{head}.{body}.{segment(bytes(256))}",
        "the alphabet of plain base64": f"{head}.{body}.{base64.b64encode(bytes([251]) * 256).decode()}",
        "bits left over in base64": f"{head}.{body}.{signature[:-1]}{'B' if signature[-1] != 'B' else 'D'}",
        "a header that is no JSON": signed(b"{", claims(), "rsa1", "RS256"),
        "a header that is a list": signed(b"[]", claims(), "rsa1", "RS256"),
        "a header that is no text": signed(b"\xff\xfe", claims(), "rsa1", "RS256"),
        "a header of 4000 brackets": signed(b"[" * 4000, claims(), "rsa1", "RS256"),
        "no alg": signed({"kid": "rsa1"}, claims(), "rsa1", "RS256"),
        "a number for alg": signed({**rsa_header, "alg": 256}, claims(), "rsa1", "RS256"),
        "claims that are no JSON": signed(rsa_header, b"{", "rsa1", "RS256"),
        "claims that are a list": signed(rsa_header, b"[]", "rsa1", "RS256"),
        "claims that are no text": signed(rsa_header, b"\xff\xfe", "rsa1", "RS256"),
        "claims of 4000 brackets": signed(rsa_header, b'{"iss":' + b"[" * 4000, "rsa1", "RS256"),
        "claims behind a byte order mark": signed(
            rsa_header, b"\xef\xbb\xbf" + json.dumps(claims()).encode(), "rsa1", "RS256"
        ),
        "a token for claims": signed({**rsa_header, "cty": "JWT"}, good.encode(), "rsa1", "RS256"),
        "huge": token(filler="x" * 7000),
    }
    # -- what is not signed by the issuer
    forged = {
        "alg none": unsigned("none"),
        "alg nOnE": unsigned("nOnE"),
        "alg none with the signature left on": unsigned("none", signature),
        "an empty alg": unsigned(""),
        "alg twice, and none is the last": signed(
            b'{"alg": "RS256", "kid": "rsa1", "alg": "none"}', claims(), "rsa1", "RS256"
        ),
        "a MAC with the public key as PEM": with_mac(pem),
        "a MAC with the public key as PEM without its last line end": with_mac(pem.strip()),
        "a MAC with the public key as DER": with_mac(der),
        "a MAC with the public key's JWK": with_mac(json.dumps(public_jwk("rsa1")).encode()),
        "a MAC with the modulus": with_mac(public.public_numbers().n.to_bytes(256, "big")),
        "a MAC with no secret": with_mac(b""),
        "HS384": with_mac(pem, "HS384"),
        "HS512": with_mac(pem, "HS512"),
        "claims changed after signing": f"{head}.{segment(claims(sub='mallory'))}.{signature}",
        "a header changed after signing": f"{segment({**rsa_header, 'x': 1})}.{body}.{signature}",
        "another key under a known id": token("rsa2", header={"kid": "rsa1"}),
        "another key under its own id": token("rsa2"),
        "another key beside its public half": token("rsa2", header={"kid": "rsa1", "jwk": public_jwk("rsa2")}),
        "another key and where to find it": token(
            "rsa2", header={"kid": "rsa2", "jku": "http://127.0.0.1:9/", "x5u": "http://127.0.0.1:9/"}
        ),
        "another key and a certificate": token("rsa2", header={"kid": "rsa1", "x5c": [base64.b64encode(der).decode()]}),
        "an id that is a path": token("rsa2", header={"kid": "../../../../dev/null"}),
        "an id that is a URL": token("rsa2", header={"kid": "http://127.0.0.1:9/"}),
        "an id of 4000 characters": token("rsa2", header={"kid": "x" * 4000}),
        "an id that is SQL": token("rsa2", header={"kid": "' OR 1=1 --"}),
        "an id that is a number": token(header={"kid": 1}),
        "an id that is empty": token(header={"kid": ""}),
        "no id, where the keys do not tell": token("p256b", header={"kid": None}),
        "another curve's key": token("p256", header={"kid": "p384"}),
        "an algorithm for another curve": signed({"alg": "ES256", "kid": "p384"}, claims(), "p384", "ES384"),
        "a curve that is not accepted": token("k256"),
        "an EC algorithm with the RSA key's id": token("p256", header={"kid": "rsa1"}),
        "an RSA algorithm with the EC key's id": token("rsa1", header={"kid": "p256"}),
        "RS256 that says PS256": signed({**rsa_header, "alg": "PS256"}, claims(), "rsa1", "RS256"),
        "a hash of the whole for a signature": f"{head}.{body}.{segment(hashlib.sha256(good.encode()).digest())}",
        "a weak key's": token("rsa1024", header={"kid": "rsa1024"}),
    }
    # -- what the issuer signed for something else
    not_for_us = {
        "another issuer": token(iss="https://issuer.example/realms/other"),
        "an issuer with a slash after it": token(iss=ISSUER + "/"),
        "an issuer in capitals": token(iss=ISSUER.upper()),
        "a list of issuers": token(iss=[ISSUER]),
        "no issuer": token(iss=None),
        "another audience": token(aud="shop"),
        "an audience that begins like ours": token(aud=AUDIENCE + "2"),
        "a list of other audiences": token(aud=["shop", "account"]),
        "an empty list of audiences": token(aud=[]),
        "an audience that is an object": token(aud={AUDIENCE: True}),
        "a list of audiences with a number in it": token(aud=[AUDIENCE, 1]),
        "no audience": token(aud=None),
        "no expiry": token(exp=None),
        "an expiry that is text": token(exp=str(now + 3600)),
        "an expiry that is true": token(exp=True),
        "an expiry beyond all numbers": signed(
            rsa_header, json.dumps(claims(exp=0)).replace('"exp": 0', '"exp": 1e400').encode(), "rsa1", "RS256"
        ),
        "an expiry without an end": signed(rsa_header, b'{"exp": Infinity}', "rsa1", "RS256"),
        "not yet valid": token(nbf=now + 600),
        "a start that is text": token(nbf="0"),
        "an ID token": token(typ="ID"),
        "a refresh token": token(typ="Refresh"),
        "a logout token": token(header={"typ": "logout+jwt"}),
        "a proof": token(header={"typ": "dpop+jwt"}),
        "an extension that must be understood": token(header={"crit": ["exp"]}),
        "detached claims": token(header={"b64": False, "crit": ["b64"]}),
        "detached claims that need not be understood": token(header={"b64": False}),
        "no subject": token(sub=None),
        "an empty subject": token(sub=""),
        "a subject that is a number": token(sub=7),
        "a subject of 300 characters": token(sub="a" * 300),
        "a subject with a line end": token(sub="alice\nrole=sys_admin"),
    }
    expired = {
        "expired": token(exp=now - 60),
        "expired long ago": token(exp=1),
        "expired before the epoch": token(exp=-1),
    }
    # -- whom nobody gave a role
    powerless = {
        "no roles": token(realm_access=None),
        "an empty list of roles": token_of(),
        "roles of something else": token_of("admin", "offline_access"),
        "a role in capitals": token_of("SYS_ADMIN"),
        "a role with a space": token_of(" sys_admin"),
        "roles as one string": token(realm_access={"roles": "sys_admin"}),
        "roles as an object": token(realm_access={"roles": {"sys_admin": True}}),
        "roles in a list in the list": token(realm_access={"roles": [["sys_admin"]]}),
        "realm_access that is a list": token(realm_access=["sys_admin"]),
        "realm_access that is text": token(realm_access="sys_admin"),
        "roles one level too deep": token(realm_access={"realm": {"roles": ["sys_admin"]}}),
        "roles at the top": token(realm_access=None, roles=["sys_admin"]),
        "roles as groups and scope": token(realm_access=None, groups=["sys_admin"], scope="sys_admin"),
        "resource_access without a client": token(realm_access=None, resource_access={"roles": ["sys_admin"]}),
        "resource_access that is a list": token(realm_access=None, resource_access=[{"roles": ["sys_admin"]}]),
    }
    told: dict[str, tuple[Authorization, str]] = dict(sent)
    for group, code in ((malformed, INVALID), (forged, INVALID), (not_for_us, INVALID), (expired, EXPIRED)):
        told |= {name: (f"Bearer {each}", code) for name, each in group.items()}
    return told | {name: (f"Bearer {each}", DENIED) for name, each in powerless.items()}
