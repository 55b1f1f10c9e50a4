"""How much of each a door takes on at a time, and the places for it; and for how long it waits for a client. What is
refused is told so at once: a request that waits for room holds memory and helps nobody, for its client has given up by
the time it is served."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import msgspec

from saga.errors import Detail, Invalid, Overloaded

MAX_HEADERS = 100
"""Of one request. As many as Apache takes; browsers and proxies send some thirty."""

SMALL_BODY_BYTES = 64 * 1024
"""What every request may send without taking any of the room for bodies, so that those who fill it stop large bodies
only. With `max_requests` it bounds what small ones take."""

HANDSHAKE_SECS = 10.0
"""How long a client may take for the handshake of TLS. A guess: a few round trips over the worst of lines."""

MOST_HANDSHAKES = 256
"""How many may be under way at a port; each has one of so many `Places`, as idle. An honest client is done within some
round trips, so those that only hold places lose them to each other. A guess: far more than a burst of honest clients
has at a time, far fewer than the files a process may have open."""

HEAD_SECS = 15.0
"""How long the head of a request may take: the first of a connection from when it is open, TLS handshake not included;
over HTTP/2 a later one from when it has begun. A guess: many round trips over the worst of lines."""

BODY_SECS = 30.0
"""How long a whole body, or message of gRPC, may take. A guess: a 1 MiB payload at 300 kbit/s."""

STALLED_SECS = 10.0
"""How long a client may take none of what is sent to it. A guess: far above a round trip, below any shutdown grace."""


class DoorLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one door. `max_connections`: open at a time. `max_requests`: under way at a time, long polls and
    watches too. `max_body_bytes`: of bodies that are being received, all together, beyond 64 KiB of each.
    `max_answer_bytes`: of answers that are being sent, likewise.

    The defaults are guesses: some thousand busy clients, and memory for the worst of them that a small machine has.
    """

    max_connections: int = 1000
    max_requests: int = 2000
    max_body_bytes: int = 128 * 1024 * 1024
    max_answer_bytes: int = 128 * 1024 * 1024


def check_header_count(count: int) -> None:
    """`Invalid`: a request has more than `MAX_HEADERS`. Their size is bounded where they are read."""
    if count > MAX_HEADERS:
        message = f"expected at most {MAX_HEADERS} headers, got {count}"
        raise Invalid(message, (Detail(field="", reason="too_many_headers", message=message),))


class Room:
    """Counts what is taken on at a time. `what` names it to whoever is refused."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self.taken = 0

    @property
    def is_full(self) -> bool:
        return self.taken >= self._most

    def refusal(self) -> Overloaded:
        """The error for whoever comes while it is full."""
        return Overloaded(f"too many {self._what} at a time; try again")

    def take(self, amount: int = 1) -> None:
        """`Overloaded`: so much is not left, and nothing was taken. What is more than there ever is, is taken when
        nothing else is: else it could never be."""
        if self.taken + amount > self._most and self.taken:
            raise self.refusal()
        self.taken += amount

    def give(self, amount: int = 1) -> None:
        """Gives back what was taken."""
        self.taken -= amount


class BodyRoom:
    """The room for bodies of one door: those that come, or those that go. `what` names them to whoever is refused."""

    def __init__(self, most_bytes: int, what: str = "large bodies") -> None:
        self._room = Room(most_bytes, what)

    @property
    def taken(self) -> int:
        return self._room.taken

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """The place of one body; the value is told how long it has become. `Overloaded`, from that: too long for what
        is left."""
        held = 0

        def has(size: int) -> None:
            nonlocal held
            more = max(0, size - SMALL_BODY_BYTES) - held
            if more > 0:
                self._room.take(more)
                held += more

        try:
            yield has
        finally:
            self._room.give(held)


Key = TypeVar("Key", bound=Hashable)


class Places(Generic[Key]):
    """The open connections of a door. When there are `most`, a newcomer gets the place of the one that has been idle
    longest, so that those who only hold places lose them; if none is idle, or the door is shut, the newcomer is turned
    away."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._closers: dict[Key, Callable[[], None]] = {}
        self._idle: dict[Key, None] = {}
        """In the order in which they became idle."""
        self._shut = False

    def __len__(self) -> int:
        return len(self._closers)

    def take(self, key: Key, close: Callable[[], None]) -> bool:
        """Whether there is a place for this connection, which counts as idle. `close` is called to take it away."""
        if self._shut:
            return False
        if len(self._closers) >= self._most:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            self._take_away(oldest)
        self._closers[key] = close
        self._idle[key] = None
        return True

    def busy(self, key: Key) -> None:
        """A request is under way on it."""
        self._idle.pop(key, None)

    def idle(self, key: Key) -> None:
        """None is any more."""
        if key in self._closers:
            self._idle.pop(key, None)
            self._idle[key] = None

    def leave(self, key: Key) -> None:
        """It is closed; that it was taken away before does not matter."""
        self._closers.pop(key, None)
        self._idle.pop(key, None)

    def shut(self) -> None:
        """Takes all places away, and gives none any more."""
        self._shut = True
        for key in list(self._closers):
            self._take_away(key)

    def _take_away(self, key: Key) -> None:
        close = self._closers[key]
        self.leave(key)
        close()
