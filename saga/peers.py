"""The other end of a connection: its address, and whether it is still there."""

from __future__ import annotations

import socket
from typing import Any, Protocol

SILENT_SECS, PROBE_SECS, PROBES = 30, 10, 3
"""After so long without a sign of life the system asks, that often, before it ends the connection: a minute in all. A
guess: below the time a long poll may last, and no load."""


class Connection(Protocol):
    """A connected socket, of whichever library."""

    def getpeername(self) -> Any: ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def peer_of(connection: Connection) -> str | None:
    """The address at the other end, to be asked for when the connection comes. None: it has ended already."""
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return None


def watch_for_silence(connection: Connection) -> None:
    """Has the system end the connection when its peer is gone without a word: a machine that lost its power, a router
    that forgot it."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", SILENT_SECS), ("TCP_KEEPINTVL", PROBE_SECS), ("TCP_KEEPCNT", PROBES)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    except OSError:
        pass  # it has ended already, which whoever reads from it finds out
