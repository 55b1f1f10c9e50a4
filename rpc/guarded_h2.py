"""One HTTP/2 connection of the gRPC door: what a client sends ends its own connection or stream at most, and says so in
one line of the log.

grpclib 0.4.9 lets errors of its parser, and events it has no row for, out of `data_received`, where they are nobody's;
and a request without its method or path is an error in its own code.
"""

from __future__ import annotations

import logging
from typing import Any

from grpclib.protocol import EventsProcessor, H2Protocol
from h2.events import Event

log = logging.getLogger("saga.rpc.server")

NEEDED = frozenset({":method", ":path"})
"""Headers a call cannot be told without."""


class _Events(EventsProcessor):
    def process(self, event: Event) -> None:
        # HTTP/2 says of what is not known: ignore it. grpclib raises.
        if event.__class__ in getattr(self, "processors", ()):
            super().process(event)


class GuardedH2Protocol(H2Protocol):
    """As grpclib's. A connection that has failed takes nothing more."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.processor = _Events(self.handler, self.connection)

    def data_received(self, data: bytes) -> None:
        if self.connection.is_closing():
            return
        try:
            super().data_received(data)
        except Exception as error:  # noqa: BLE001  (whatever a client can provoke in the parser)
            log.warning("grpc_connection_failed error=%r", error)
            self.processor.close("unreadable HTTP/2")
