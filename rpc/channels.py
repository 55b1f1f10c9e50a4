"""The pooled connections to one participant: opened when needed, more of them under load, replaced when they end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import ssl
from collections.abc import Callable

import msgspec
import trio

from bridge import run_aio, running_loop
from rpc.exchange import Header, Reply
from rpc.http2 import Link
from rpc.metadata import encode_timeout
from rpc.outcomes import Lost, failed_before_leaving, not_done
from rpc.settings import ServiceSettings, ServiceTls
from rpc.single_flight import RunCancelled, SingleFlight
from saga.ports import Outcome

log = logging.getLogger("saga.rpc")

_PAUSE_AFTER_FAILED_EXTRA_SECS = 1.0
"""A guess: long enough to be no load, short against the deadline of a step."""


REFUSALS_PASSED_OVER = 5
"""How often a call that the peer says it has not looked at (REFUSED_STREAM, GOAWAY) is sent again as if nothing had
been, as gRPC clients do. grpc servers count a stream a moment longer than their client can, so a full connection
refuses calls that are within its limit; each of them would else cost the step an attempt and its backoff."""

GOODBYE_SECS = 0.25
"""How long a connection that we close waits for the peer's half of TLS's goodbye. A guess, and short: grpc servers say
nothing then."""

_PAUSE_AFTER_REFUSAL_SECS = 0.01
"""A guess at that moment."""


class PoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How a pool behaves; the defaults are for production, tests bring smaller ones.

    `max_connections`: each carries as many calls as the participant allows (100 for grpclib); what is over waits its
    turn within its deadline. `connect_timeout_secs`: what gRPC implementations give a connection attempt.
    `ping_timeout_secs`: how long a peer that may be frozen has to answer. `calls_per_connection`: half of the ids
    HTTP/2 has for the calls of one connection, so that it is replaced long before they end.
    """

    max_connections: int = 8
    connect_timeout_secs: float = 20.0
    ping_timeout_secs: float = 5.0
    calls_per_connection: int = 2**29


class CallInFlight:
    """How far one attempt has come, for whoever has to judge it when its time is up.

    `left`: something of it was sent, so it may have been done.
    """

    __slots__ = ("left", "link", "sent_at")

    def __init__(self) -> None:
        self.left = False
        self.link: Link | None = None
        self.sent_at = 0.0


class ServiceChannel:
    """All connections to one participant. The constructor does no I/O.

    `on_disconnect` is called when the last connection has gone: what comes back may be another version.
    """

    def __init__(self, settings: ServiceSettings, limits: PoolLimits, on_disconnect: Callable[[], None]) -> None:
        self.settings = settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.authority = f"{host}:{settings.port}"
        self.scheme = "https" if settings.tls else "http"
        self._limits = limits
        self._on_disconnect = on_disconnect
        self._links: list[Link] = []
        self._not_gone: set[Link] = set()
        self._connecting: SingleFlight[Link] = SingleFlight(self._connect, self._connecting_ended)
        self._retry_at = -math.inf
        self._waiting = trio.lowlevel.ParkingLot()
        self._tls: ssl.SSLContext | None = None
        self._tls_stamps: list[tuple[int, ...]] = []
        self._closed = False

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    async def unary(
        self,
        headers: list[Header],
        metadata: list[Header],
        request: bytes,
        *,
        deadline: float,
        answer_limit: int,
        progress: CallInFlight,
    ) -> Reply:
        """Makes one call; `deadline` (Trio's clock) is told to the participant, keeping it is the caller's. Raises
        `Lost`. Cancelled: the stream is reset before it returns, and the other calls do not notice."""
        for tries_left in range(REFUSALS_PASSED_OVER, -1, -1):
            link = self._link_with_room() or await self._wait_for_link()
            link.in_flight += 1
            progress.link = link
            progress.sent_at = now = trio.current_time()
            exchange = link.exchange(answer_limit)
            timeout = ("grpc-timeout", encode_timeout(deadline - now))
            try:
                return await exchange.run([*headers, timeout, *metadata], request)
            except Lost as lost:
                if lost.outcome is not Outcome.NOT_DONE or not tries_left:
                    raise
            finally:
                progress.left = exchange.left
                self._give_back(link)
            progress.left = False
            await trio.sleep(_PAUSE_AFTER_REFUSAL_SECS)
        raise AssertionError("the last try returns or raises")

    def _link_with_room(self) -> Link | None:
        best, most = None, 0
        for link in self._links:
            room = link.room
            if room > most:
                best, most = link, room
        return best

    async def _wait_for_link(self) -> Link:
        while True:
            if self._closed:
                raise not_done("UNAVAILABLE", "this worker is shutting down")
            link = self._link_with_room()
            if link is not None:
                return link
            connecting = self._connecting
            usable = sum(link.usable for link in self._links)
            # With calls to wait for, a peer that takes no further connection is asked again only after a while.
            if not usable or (usable < self._limits.max_connections and trio.current_time() >= self._retry_at):
                connecting.start()
            runs = connecting.runs
            # Whoever is woken looks again: a call that came meanwhile may have taken the place.
            await self._waiting.park()
            if not self._links and connecting.runs != runs and connecting.failure is not None:
                raise self._lost_connecting(connecting.failure)

    def _connecting_ended(self) -> None:
        if self._connecting.failure is not None:
            self._retry_at = trio.current_time() + _PAUSE_AFTER_FAILED_EXTRA_SECS
        self._waiting.unpark_all()

    def _lost_connecting(self, error: Exception) -> Lost:
        if isinstance(error, RunCancelled):
            return not_done("UNAVAILABLE", "this worker is shutting down")
        return failed_before_leaving(error, f"connecting to {self.authority}")

    def _give_back(self, link: Link) -> None:
        link.in_flight -= 1
        link.retire_after(self._limits.calls_per_connection)
        link.close_if_idle()
        self._waiting.unpark()

    def _changed(self) -> None:
        """Some link takes more or fewer calls than before, or is gone."""
        had = bool(self._links)
        self._links = [link for link in self._links if not link.closed]
        if had and not self._links:
            self._on_disconnect()
        self._waiting.unpark_all()

    async def _connect(self) -> Link:
        """In asyncio: one connection attempt; the link is in the pool when it returns."""
        settings = self.settings
        context = self.tls_context()
        async with asyncio.timeout(self._limits.connect_timeout_secs):
            _, link = await running_loop().create_connection(
                lambda: Link(self.authority, self._changed, self._limits.ping_timeout_secs),
                settings.host,
                settings.port,
                ssl=context,
                server_hostname=(settings.tls.server_name or settings.host) if settings.tls else None,
                ssl_shutdown_timeout=None if context is None else GOODBYE_SECS,
                happy_eyeballs_delay=0.25,
            )
            self._not_gone.add(link)
            link.gone.add_done_callback(lambda _: self._not_gone.discard(link))
            try:
                await link.ready
            except BaseException:
                link.abandon("it does not say its HTTP/2 settings")
                raise
        if link.closed:  # between its settings and this task's turn
            raise ConnectionError("the connection was closed before it could be used")
        self._links.append(link)
        return link

    def tls_context(self) -> ssl.SSLContext | None:
        """The context of this participant, read from its files anew when they have changed; None: cleartext. Raises
        OSError, ssl.SSLError; with a context that was good, one from files that are not is logged, and it stays."""
        tls = self.settings.tls
        if tls is None:
            return None
        # Stamps are taken before the files are read: a change in between is seen as one the next time.
        stamps = [_stamp(file) for file in (tls.ca_file, tls.cert_file, tls.key_file) if file is not None]
        if self._tls is None or stamps != self._tls_stamps:
            try:
                self._tls = _tls_context(tls)
            except (OSError, ValueError) as error:
                if self._tls is None:
                    raise
                log.error("participant_tls_files_unusable authority=%s error=%s", self.authority, error)
            self._tls_stamps = stamps
        return self._tls

    async def aclose(self) -> None:
        """Ends everything: calls in flight become in doubt, later ones are refused here."""
        self._closed = True
        self._connecting.cancel()
        for link in list(self._links):
            link.abandon("this worker is shutting down")
        self._changed()
        with trio.CancelScope(shield=True):
            await run_aio(self._until_gone())

    async def _until_gone(self) -> None:
        """In asyncio: connections end in callbacks of the loop; one left to the garbage collector warns."""
        await asyncio.sleep(0)
        if self._not_gone:
            await asyncio.wait([link.gone for link in self._not_gone], timeout=GOODBYE_SECS)
        for link in list(self._not_gone):
            link.abort()
        await asyncio.sleep(0)


def _stamp(file: str) -> tuple[int, ...]:
    """Another one for another content: files are replaced by new ones, and links are moved."""
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _tls_context(tls: ServiceTls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=tls.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context
