"""What a client is told of a TLS handshake that fails."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import trio

from tests.support.certificates import client_context
from tests.support.doors import open_doors


def handshake_of_a_client_with_other_ciphers(port: int, ca_file: str) -> None:
    context = client_context(ca_file, "h2")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES256-GCM-SHA384")  # without the forward secrecy that both doors want
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        context.wrap_socket(plain, server_hostname="localhost").close()


@pytest.mark.parametrize("door", ["rest", "grpc"])
async def test_a_client_whose_handshake_fails_gets_the_alert_that_says_why(tmp_path: Path, door: str) -> None:
    async with open_doors(tmp_path, tls=True) as doors:
        assert doors.made is not None
        port = doors.grpc_port if door == "grpc" else doors.rest_port
        with pytest.raises(ssl.SSLError) as caught:
            await trio.to_thread.run_sync(handshake_of_a_client_with_other_ciphers, port, doors.made.ca_file)
        assert "ALERT_HANDSHAKE_FAILURE" in (caught.value.reason or "").upper().replace(" ", "_")
