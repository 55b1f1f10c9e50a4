"""What a client of HTTP/2 may cost beside what it asks for: frames that ask for nothing, and heads that do not end.

Requests are bounded by how many are under way; one that is reset at once, a ping or an empty frame is under way never
and costs its work all the same. So each connection has a number of those, which comes back with time and with requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import trio

LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 512, 16 * 1024
"""How much of what a client sends is taken at a time: as little as some fifty of the smallest frames, which is a matter
of milliseconds, and twice as much after each piece that held few; so a body comes in long pieces, and a flood in short
ones."""

FEW_EVENTS = 16
"""A guess."""

TURN_SECS = 0.002
"""How long one connection may take piece after piece before others have their turn: fifty connections that flood us
take some tenth of a second for a turn of each."""

MAX_HEAD_BYTES = 64 * 1024
"""Of a head that is not complete; of a complete one the parser takes no more."""

IDLE_FRAMES = 200.0
"""How many frames that ask for nothing a connection may send in one go. A guess: twice the requests it may have under
way, all of them cancelled."""

IDLE_FRAMES_A_SEC = 100.0
"""How many of them come back each second. A guess: a client that gives up ten long polls a second is far below."""

IDLE_FRAMES_A_REQUEST = 0.5
"""How many come back with each request: whoever cancels less than half of theirs is never told off."""

ASKING_NOTHING = frozenset(
    {"StreamReset", "PingReceived", "RemoteSettingsChanged", "PriorityUpdated", "UnknownFrameReceived"}
)
"""What h2 calls them; with empty data. Not the frames that widen a window: a client that reads fast sends many."""

HEADERS, CONTINUATION = 1, 9


class Frames(Protocol):
    """Where h2 keeps what of a frame, or of a head in several, has come. Names of its own that it offers no other way
    to see."""

    _data: bytearray
    _headers_buffer: list[Any]


class BadManners(Exception):
    """The connection is to be ended; the text says why."""


class Turns:
    """Of the connections that have sent more than is taken at once: one of them goes on in each tick, so that what a
    flood costs is between the answers to others, and not before them."""

    def __init__(self) -> None:
        self._next = trio.Lock()

    async def wait(self) -> None:
        """Returns after those who waited before."""
        async with self._next:
            await trio.lowlevel.checkpoint()


class Manners:
    """Of one connection."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._left = IDLE_FRAMES
        self.piece_bytes = LEAST_PIECE_BYTES
        """How much is to be taken next."""
        self.had_much = False
        """The piece before held more than few events."""
        self._counted_at = trio.current_time()

    def judge(self, events: Sequence[object]) -> None:
        """Counts what one piece held. `BadManners`: too much of it asked for nothing, or a head grows too long."""
        self.had_much = len(events) > FEW_EVENTS
        self.piece_bytes = LEAST_PIECE_BYTES if self.had_much else min(2 * self.piece_bytes, MOST_PIECE_BYTES)
        now = trio.current_time()
        back = IDLE_FRAMES_A_SEC * (now - self._counted_at)
        spent = 0
        for event in events:
            kind = type(event).__name__
            if kind in ASKING_NOTHING or (kind == "DataReceived" and _is_empty(event)):
                spent += 1
            elif kind == "RequestReceived":
                back += IDLE_FRAMES_A_REQUEST
        self._counted_at = now
        self._left = min(IDLE_FRAMES, self._left + back) - spent
        if self._left < 0:
            raise BadManners("too many frames that ask for nothing")
        if sum(len(frame.data) for frame in self._frames._headers_buffer) > MAX_HEAD_BYTES:
            raise BadManners(f"a head of more than {MAX_HEAD_BYTES} bytes")

    def forget(self) -> None:
        """Drops what was not taken, at the end of the connection; the rest of it goes when the garbage is collected."""
        self._frames._data.clear()
        self._frames._headers_buffer.clear()

    @property
    def head_is_under_way(self) -> bool:
        """The head of a request has begun and is not complete."""
        begun = self._frames._data[:4]
        return bool(self._frames._headers_buffer) or (len(begun) == 4 and begun[3] in (HEADERS, CONTINUATION))


def _is_empty(event: Any) -> bool:
    return not event.data and event.stream_ended is None
