"""Certificates for tests that speak TLS, made on the spot."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest


class Certificate(msgspec.Struct, frozen=True):
    """Paths of PEM files. `cert_file` is its own authority."""

    cert_file: str
    key_file: str


def self_signed(folder: Path, name: str = "localhost") -> Certificate:
    """A certificate for `name` and 127.0.0.1. Skips the test where the `openssl` program is missing."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    made = Certificate(str(folder / "cert.pem"), str(folder / "key.pem"))
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-keyout", made.key_file, "-out", made.cert_file], check=True, capture_output=True)
    return made
