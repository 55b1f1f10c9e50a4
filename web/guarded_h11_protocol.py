"""Holds off a defect of hypercorn 0.18: an HTTP/1 connection that is kept for ever for a client that is gone.

While a request is answered that another one came behind, nothing is read; what reads waits for the answer to be sent.
If the client goes away meanwhile, the answer cannot be sent, nobody says so, and the wait has no end: each such
connection costs a file until the process stops. Here the end of the connection ends the wait.

Nor is an answer cut off that says it is the last, because more has come behind its request.

A method is taken for the one in capitals, so that `head` is answered without a body; to h11 it is another one, whose
answer has the body it announces: an error, and no answer. Here a method not in capitals is refused.

It also writes the head of an answer and its body apart; here they go out together, which saves a system call, and most
clients a wake-up, for each request.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, cast

import h11
import hypercorn.protocol
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h11 import H2CProtocolRequiredError, H2ProtocolAssumedError, H11Protocol
from hypercorn.typing import H11SendableEvent


class _Ended:
    """In the place of the state of a connection that has ended: whoever reads is told so, what is sent is dropped."""

    they_are_waiting_for_100_continue = False
    our_state = h11.CLOSED
    their_state = h11.ERROR  # with it hypercorn takes no offence at `send`
    trailing_data = (b"", True)

    def receive_data(self, data: bytes) -> None:
        pass

    def next_event(self) -> h11.ConnectionClosed:
        return h11.ConnectionClosed()

    def send(self, event: object) -> bytes:
        raise h11.LocalProtocolError("the connection has ended")


class GuardedH11Protocol(H11Protocol):
    """One HTTP/1 connection; when it closes, nobody goes on waiting to read from it."""

    _head = b""
    """The head of the answer, until what comes next is sent: all our answers have their body at hand."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._send = self.send
        self.send = self._send_unless_it_cuts

    async def _send_unless_it_cuts(self, event: Event) -> None:
        if isinstance(event, Closed) and self.stream is not None and self.connection.our_state is h11.SEND_BODY:
            # What came behind a request whose answer ends the connection is an error to h11; the answer ends it.
            return
        await self._send(event)

    async def handle(self, event: Event) -> None:
        try:
            await super().handle(event)
        except (H2CProtocolRequiredError, H2ProtocolAssumedError):
            # What has come is another protocol's, and is not kept here until the garbage is collected.
            self.connection = cast(Any, _Ended())
            raise
        if isinstance(event, Closed):
            self.connection = cast(Any, _Ended())
            await self.can_read.set()

    async def _create_stream(self, request: h11.Request) -> None:
        if request.method.isupper():
            await super()._create_stream(request)
            return
        await self._send_error_response(HTTPStatus.NOT_IMPLEMENTED)
        await self.send(Closed())

    async def _send_h11_event(self, event: H11SendableEvent) -> None:
        try:
            data = self.connection.send(event)
        except h11.LocalProtocolError:
            if self.connection.their_state != h11.ERROR:
                raise
            return
        if isinstance(event, h11.Response):
            self._head = data
            return
        data, self._head = self._head + data, b""
        if data:  # the end of an answer of a known length has none
            await self.send(RawData(data=data))


def install() -> None:
    """hypercorn looks the class up in its module for each connection, and offers no other way to set it."""
    setattr(hypercorn.protocol, "H11Protocol", GuardedH11Protocol)  # noqa: B010  # not exported, so no plain assignment
