"""A client of the gRPC door over TLS that sends a flood and leaves: it has ended before all of the flood is taken."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import trio

from tests.server.test_hostile_connections import PING, WINDOW_UPDATE, frame
from tests.server.test_limits import until_closed
from tests.support.certificates import client_context
from tests.support.doors import Doors, open_doors
from tests.web.raw import H2_PREFACE

BEFORE = frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 2000
"""Taken in many turns, none of which ends the connection; so the end of the client is noticed between two of them."""

FLOOD = frame(PING, 0, 0, b"x" * 8) * 500
"""More than a connection may send."""


def connect(doors: Doors) -> ssl.SSLSocket:
    """A connection that the door has begun to serve."""
    assert doors.made is not None
    context = client_context(doors.made.ca_file, "h2")
    plain = socket.create_connection(("127.0.0.1", doors.grpc_port), timeout=20)
    encrypted = context.wrap_socket(plain, server_hostname="localhost")
    encrypted.sendall(H2_PREFACE)
    assert encrypted.recv(1)  # of its settings
    return encrypted


def send_and_leave(encrypted: ssl.SSLSocket, data: bytes) -> socket.socket:
    """Sends all and ends without TLS's goodbye; the server, which is in this thread, has no turn in between. What is
    left is the side on which it is seen that the server ends too."""
    encrypted.sendall(data)
    left = socket.socket(fileno=encrypted.detach())
    left.shutdown(socket.SHUT_WR)
    left.setblocking(False)
    return left


async def test_a_flood_over_tls_whose_client_has_left_is_ended(tmp_path: Path) -> None:
    async with open_doors(tmp_path, tls=True) as doors:
        encrypted = await trio.to_thread.run_sync(connect, doors)
        left = trio.SocketStream(trio.socket.from_stdlib_socket(send_and_leave(encrypted, BEFORE + FLOOD)))
        async with left:
            await until_closed(left)
        await doors.check()
