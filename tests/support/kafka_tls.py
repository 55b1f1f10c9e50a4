"""TLS and SASL in front of the mock broker, which has neither: a proxy that ends both and passes the rest on.

It gives its own port out in place of the broker's, so that clients come back to it.
"""

from __future__ import annotations

import asyncio
import queue
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

API_VERSIONS, SASL_HANDSHAKE, SASL_AUTHENTICATE = 18, 17, 36
UNSUPPORTED_MECHANISM, AUTHENTICATION_FAILED = 33, 58
OFFERED = (b"PLAIN",)


@dataclass
class TlsProxy:
    """`users`: name and password; none: clients do not log in. `logins` that succeeded, by name. `shown`: the
    certificate of each connection's client, in DER; None: it showed none."""

    broker_port: int
    context: ssl.SSLContext
    users: dict[str, str]
    port: int = 0
    logins: list[str] = field(default_factory=list)
    shown: list[bytes | None] = field(default_factory=list)

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, started: queue.Queue[asyncio.Task[None]]) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self.context)
        self.port = server.sockets[0].getsockname()[1]
        task = asyncio.current_task()
        assert task is not None
        started.put(task)
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.shown.append(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", self.broker_port)
        asked: dict[int, int] = {}
        """The kind of each request under way, by its correlation id."""
        answers = asyncio.create_task(self._answers(broker_reader, writer, asked))
        try:
            await self._requests(reader, writer, broker_writer, asked)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            answers.cancel()
            for end in (writer, broker_writer):
                end.transport.abort()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        broker: asyncio.StreamWriter,
        asked: dict[int, int],
    ) -> None:
        known = not self.users
        while True:
            frame = await _frame(reader)
            kind, _, correlation = struct.unpack_from(">hhi", frame)
            (client_id,) = struct.unpack_from(">h", frame, 8)
            body = frame[10 + max(client_id, 0) :]
            if kind == SASL_HANDSHAKE:
                code = 0 if _text(body) in OFFERED else UNSUPPORTED_MECHANISM
                offered = b"".join(struct.pack(">h", len(name)) + name for name in OFFERED)
                _write(writer, struct.pack(">ihi", correlation, code, len(OFFERED)) + offered)
            elif kind == SASL_AUTHENTICATE:
                _, name, password = body[4:].decode().split("\0")
                known = self.users.get(name) == password
                if known:
                    self.logins.append(name)
                told = struct.pack(">h", -1) if known else struct.pack(">h", 14) + b"wrong password"
                code = 0 if known else AUTHENTICATION_FAILED
                _write(writer, struct.pack(">ih", correlation, code) + told + struct.pack(">i", 0))
            elif known or kind == API_VERSIONS:
                asked[correlation] = kind
                _write(broker, frame)
            else:
                return  # as brokers do with those who have not logged in

    async def _answers(self, broker: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[int, int]) -> None:
        real, ours = (b"127.0.0.1" + struct.pack(">i", port) for port in (self.broker_port, self.port))
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(broker)
                correlation, code, count = struct.unpack_from(">ihi", frame)
                if asked.pop(correlation, None) == API_VERSIONS and len(frame) == 10 + 6 * count:
                    sasl = struct.pack(">hhhhhh", SASL_HANDSHAKE, 0, 1, SASL_AUTHENTICATE, 0, 0)
                    frame = struct.pack(">ihi", correlation, code, count + 2) + frame[10:] + sasl
                _write(writer, frame.replace(real, ours))


async def _frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def _write(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(len(frame).to_bytes(4, "big") + frame)


def _text(body: bytes) -> bytes:
    return body[2 : 2 + int.from_bytes(body[:2], "big")]


@contextmanager
def tls_proxy(bootstrap: str, context: ssl.SSLContext, users: dict[str, str] | None = None) -> Iterator[TlsProxy]:
    """A proxy to the broker at `bootstrap`, in a thread of its own, for as long as the block lasts."""
    proxy = TlsProxy(int(bootstrap.rpartition(":")[2]), context, users or {})
    started: queue.Queue[asyncio.Task[None]] = queue.Queue()

    def run() -> None:
        # Not asyncio.run: trio-asyncio changes what that does.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(proxy.serve(started))

    thread = threading.Thread(target=run)
    thread.start()
    task = started.get(timeout=20)
    try:
        yield proxy
    finally:
        task.get_loop().call_soon_threadsafe(task.cancel)
        thread.join(20)
