"""Connections whose other end is gone without a word: a machine that lost its power, a router that forgot them."""

from __future__ import annotations

import socket
from typing import Protocol

IDLE_SECS, PROBE_SECS, PROBES = 30, 10, 3
"""After so long without a sign of life the system asks, that often, before it ends the connection: a minute in all. A
guess: below the time a long poll may last, and no load."""


class Options(Protocol):
    """A socket, as far as its options go."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def watch_for_silence(connection: Options) -> None:
    """Has the system end the connection when its peer is no longer there."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", IDLE_SECS), ("TCP_KEEPINTVL", PROBE_SECS), ("TCP_KEEPCNT", PROBES)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    except OSError:
        pass  # it has ended already, which whoever reads from it finds out
