"""The loop inside Trio: asyncio's promises, Trio's clock and fairness, and the defects of its libraries held off."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from grpclib.server import Server

import bridge
from bridge import fast_loop, run_aio
from tests.support.certificates import certificate


@pytest.fixture
async def loop() -> AsyncIterator[asyncio.AbstractEventLoop]:
    async with bridge.open_loop() as loop:
        yield loop


async def test_the_installed_trio_asyncio_gets_the_fast_loop(loop: asyncio.AbstractEventLoop) -> None:
    assert isinstance(loop, fast_loop.FastLoop)


async def test_another_trio_asyncio_gets_its_own_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fast_loop, "WRITTEN_FOR", "0.99.")
    monkeypatch.setattr(fast_loop, "_open", fast_loop._opener())

    async def greet() -> str:
        await asyncio.sleep(0)
        return await bridge.call_trio(reply)

    async def reply() -> str:
        return "hello"

    async with bridge.open_loop() as loop:
        assert not isinstance(loop, fast_loop.FastLoop)
        assert await run_aio(greet()) == "hello"
    assert "stock_loop_used" in caplog.text


async def test_callbacks_run_in_order_and_later_ones_in_the_same_tick(loop: asyncio.AbstractEventLoop) -> None:
    seen: list[int] = []
    done = trio.Event()
    loop.call_soon(seen.append, 1)

    def last() -> None:
        seen.append(3)
        done.set()

    loop.call_soon(lambda: loop.call_soon(last))
    loop.call_soon(seen.append, 2)
    await done.wait()
    assert seen == [1, 2, 3]


async def test_a_cancelled_callback_does_not_run(loop: asyncio.AbstractEventLoop) -> None:
    seen: list[str] = []
    loop.call_soon(seen.append, "cancelled").cancel()
    loop.call_later(0, seen.append, "cancelled").cancel()
    await run_aio(asyncio.sleep(0.01))
    assert seen == []


async def test_timers_follow_trios_clock(loop: asyncio.AbstractEventLoop, autojump_clock: trio.abc.Clock) -> None:
    start = trio.current_time()
    fired: list[tuple[str, float]] = []

    def fire(name: str) -> None:
        fired.append((name, round(trio.current_time() - start, 3)))

    for name, delay in (("third", 3000.0), ("first", 10.0), ("second", 20.0)):
        loop.call_later(delay, fire, name)
    await run_aio(asyncio.sleep(5000))
    assert fired == [("first", 10.0), ("second", 20.0), ("third", 3000.0)]


async def test_a_negative_delay_is_due_at_once(loop: asyncio.AbstractEventLoop) -> None:
    done = trio.Event()
    loop.call_later(-1, done.set)
    with trio.fail_after(5):
        await done.wait()


async def test_cancelled_timers_are_forgotten_before_they_are_due(loop: asyncio.AbstractEventLoop) -> None:
    assert isinstance(loop, fast_loop.FastLoop)
    timers = [loop.call_later(3600, list) for _ in range(1000)]
    await run_aio(asyncio.sleep(0))
    for timer in timers:
        timer.cancel()
    assert len(loop._timers) < 200


async def test_endless_callbacks_do_not_starve_trio(loop: asyncio.AbstractEventLoop) -> None:
    stop = False

    def again() -> None:
        if not stop:
            loop.call_soon(again)

    again()
    with trio.fail_after(5):
        for _ in range(20):
            await trio.lowlevel.checkpoint()
    stop = True


async def test_a_callback_from_another_thread_is_run(loop: asyncio.AbstractEventLoop) -> None:
    done = trio.Event()
    await trio.to_thread.run_sync(loop.call_soon_threadsafe, done.set)
    with trio.fail_after(5):
        await done.wait()


async def test_blocking_work_goes_to_a_thread(loop: asyncio.AbstractEventLoop) -> None:
    async def work() -> int:
        return await asyncio.to_thread(sum, [1, 2])

    assert await run_aio(work()) == 3


async def test_many_connections_at_once_are_all_served(loop: asyncio.AbstractEventLoop) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    async def one(port: int, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"%d\n" % number)
        assert await reader.readline() == b"%d\n" % number
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        await asyncio.gather(*(one(port, number) for number in range(200)))
        server.close()

    with trio.fail_after(10):
        await run_aio(main())


async def test_a_large_transfer_waits_for_its_reader(loop: asyncio.AbstractEventLoop) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    sent = os.urandom(4_000_000)

    async def send() -> None:
        await asyncio.get_running_loop().sock_sendall(ours, sent)
        ours.close()

    async def receive() -> bytes:
        task = asyncio.ensure_future(send())
        received = bytearray()
        while chunk := await asyncio.get_running_loop().sock_recv(theirs, 65536):
            received += chunk
        await task
        return bytes(received)

    with theirs, trio.fail_after(10):
        assert await run_aio(receive()) == sent


async def test_a_subprocess_is_waited_for(loop: asyncio.AbstractEventLoop) -> None:
    async def run() -> tuple[bytes, int | None]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "print('out')", stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return out, process.returncode

    with trio.fail_after(20):
        assert await run_aio(run()) == (b"out\n", 0)


async def test_closing_with_work_in_flight_ends_cleanly() -> None:
    ended: list[str] = []

    async def forever(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with bridge.open_loop() as loop:
            tasks = [loop.create_task(forever(name)) for name in "ab"]
            loop.add_reader(ours, list)
            loop.call_later(3600, list)
            await run_aio(asyncio.sleep(0))
    assert sorted(ended) == ["a", "b"]
    assert all(task.cancelled() for task in tasks)


# --- what would end the process with trio-asyncio as it comes ---


async def test_a_failed_task_nobody_waits_for_is_logged(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise ValueError("lost")

    loop.create_task(fail())
    await run_aio(asyncio.sleep(0.01))
    assert "asyncio_stray_error" in caplog.text
    assert "lost" in caplog.text


async def test_a_raising_callback_is_logged(loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("in a callback")

    loop.call_soon(fail)
    loop.call_later(0, fail)
    await run_aio(asyncio.sleep(0.01))
    assert [record.getMessage()[:20] for record in caplog.records] == ["asyncio_stray_error "] * 2


async def test_an_unknown_frame_to_a_grpclib_server_is_logged(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    server = Server([])
    listener = socket.create_server(("127.0.0.1", 0))
    await run_aio(server.start(sock=listener))
    stream = await trio.open_tcp_stream(*listener.getsockname())
    async with stream:
        await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        await stream.send_all(b"\x00\x00\x00\xbb\x00\x00\x00\x00\x00")  # a frame of type 0xbb
        with trio.fail_after(5):
            while await stream.receive_some():
                pass  # until the server gives the connection up
    assert "UnknownFrameReceived" in caplog.text
    server.close()
    await run_aio(server.wait_closed())


async def test_tls_works_both_ways(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    made = certificate(tmp_path)
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(made.cert_file, made.key_file)
    client_context = ssl.create_default_context(cafile=made.ca_file)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    async def main() -> bytes:
        server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=server_context)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_context, server_hostname="localhost"
        )
        writer.write(b"hello\n")
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        server.close()
        return line

    with trio.fail_after(10):
        assert await run_aio(main()) == b"hello\n"
