"""A TCP line to a server that can be cut, or frozen: everything stays open and nothing gets through."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Line:
    """Listens on `port` and carries each connection to `to_port`, on threads of its own."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self._open: set[socket.socket] = set()
        self._is_cut = False

    def run(self) -> None:
        """Takes connections until `close`."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_cut:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._to_port))
            self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._flows.wait()
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            self._end(end)

    def freeze(self) -> None:
        """From now on nothing gets through, not even the news that a side has gone."""
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        """Ends every connection and takes no other."""
        self._is_cut = True
        for end in list(self._open):
            self._end(end)

    def mend(self) -> None:
        self._is_cut = False

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


@contextmanager
def line_to(port: int) -> Iterator[Line]:
    """A line that lasts as long as the block."""
    line = Line(port)
    taking = threading.Thread(target=line.run)
    taking.start()
    try:
        yield line
    finally:
        line.close()
        taking.join()
