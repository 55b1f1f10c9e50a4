"""A TCP line to a server that can be cut, or frozen: all stays open and nothing gets through, one way or both."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Way = Literal["asks", "answers"]
"""What clients say, and what the server says."""


class Line:
    """Listens on `port` and carries each connection to `to_port`, on threads of its own. `stands_in`: where the server
    names its own address (a Kafka broker does, and is then asked there), the line's is named instead."""

    def __init__(self, to_port: int, *, stands_in: bool = False) -> None:
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._flows: dict[Way, threading.Event] = {"asks": threading.Event(), "answers": threading.Event()}
        self.thaw()
        self._renamed = (_address(to_port), _address(self.port)) if stands_in else (b"", b"")
        self._open: set[socket.socket] = set()
        self.is_cut = False

    def run(self) -> None:
        """Takes connections until `close`."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._to_port))
            self._open |= {client, server}
            for way, source, target in (("asks", client, server), ("answers", server, client)):
                threading.Thread(target=self._carry, args=(way, source, target), daemon=True).start()

    def _carry(self, way: Way, source: socket.socket, target: socket.socket) -> None:
        theirs, ours = self._renamed
        try:
            while data := source.recv(65536):
                if way == "answers" and theirs:
                    data = data.replace(theirs, ours)
                self._flows[way].wait()
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            self._end(end)

    def freeze(self, only: Way | None = None) -> None:
        """From now on nothing gets through, not even the news that a side has gone; or nothing of one side."""
        for way, flows in self._flows.items():
            if only in (None, way):
                flows.clear()

    def thaw(self) -> None:
        for flows in self._flows.values():
            flows.set()

    def cut(self) -> None:
        """Ends every connection and takes no other."""
        self.is_cut = True
        for end in list(self._open):
            self._end(end)

    def mend(self) -> None:
        self.is_cut = False

    def _end(self, end: socket.socket) -> None:
        self._open.discard(end)
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        end.close()

    def close(self) -> None:
        self.cut()
        self.thaw()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()


def _address(port: int) -> bytes:
    """As Kafka's protocol has it: the length and text of the host, then the port."""
    return b"\x00\x09127.0.0.1" + port.to_bytes(4)


@contextmanager
def line_to(port: int, *, stands_in: bool = False) -> Iterator[Line]:
    """A line that lasts as long as the block."""
    line = Line(port, stands_in=stands_in)
    taking = threading.Thread(target=line.run)
    taking.start()
    try:
        yield line
    finally:
        line.close()
        taking.join()
