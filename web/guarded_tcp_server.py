"""Holds off a defect of hypercorn 0.18 under Trio: one bad HTTP/2 request ends the whole process.

Some inputs (data on a stream that was answered already, a path that is not ASCII) raise inside hypercorn's connection
handler; the error leaves `serve` and its nursery. Here such an error ends the one connection it came from.
"""

from __future__ import annotations

import logging

import hypercorn.trio.run
import trio
from hypercorn.trio.tcp_server import TCPServer

log = logging.getLogger("saga.web")


class GuardedTCPServer(TCPServer):
    """One connection; an error of its protocol is logged and closes it."""

    async def run(self) -> None:
        try:
            await super().run()
        except Exception as error:
            log.warning("http_connection_failed error=%r", _first(error))
            log.debug("http_connection_failed", exc_info=error)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self.stream)
        except BaseExceptionGroup as group:
            cancelled, rest = group.split(trio.Cancelled)
            if cancelled is None:
                raise
            # The server stops; what failed beside that is not worth more than a line.
            if rest is not None:
                log.warning("http_connection_failed error=%r", _first(rest))
            raise cancelled from None


def install() -> None:
    """hypercorn looks the class up in its module each time it serves, and offers no other way to set it."""
    setattr(hypercorn.trio.run, "TCPServer", GuardedTCPServer)  # noqa: B010  # not exported, so no plain assignment


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
