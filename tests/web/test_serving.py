"""Serving and stopping: the library defects held off, connections that idle, clients that leave."""

from __future__ import annotations

import errno
import logging
import socket
import struct
import time
from typing import Any

import hypercorn.trio.run
import pytest
import trio

from saga.authentication import OpenAccess
from saga.drain import Drain
from tests.support.orchestrator import HANGS
from tests.web.conftest import Site, open_site
from tests.web.raw import H2Client
from web.app import create_app
from web.guarded_tcp_server import GuardedTCPServer
from web.serving import serve_rest

GET = b"GET /api/v1/workflows HTTP/1.1\r\nHost: a\r\n\r\n"


async def read_answer(stream: trio.SocketStream) -> bytes:
    """One answer with a Content-Length."""
    received = b""
    with trio.fail_after(5):
        while True:
            chunk = await stream.receive_some()
            assert chunk, received
            received += chunk
            head, separator, body = received.partition(b"\r\n\r\n")
            if separator and len(body) >= int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
                return received


async def read_to_the_end(stream: trio.SocketStream) -> None:
    """Returns when the server has closed, politely or not."""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass


async def test_an_idle_connection_is_closed_after_the_keep_alive_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.serving.KEEP_ALIVE_SECS", 0.3)
    async with open_site() as site:
        for path in (GET, GET.replace(b"/api/v1/workflows", b"/api/v1/sagas/x")):
            stream = await trio.open_tcp_stream("127.0.0.1", site.port)
            async with stream:
                await stream.send_all(path)
                await read_answer(stream)
                with trio.fail_after(3):
                    assert await stream.receive_some() == b""


async def test_a_client_that_stays_connected_does_not_hold_the_stop_up() -> None:
    async with open_site(grace_secs=20) as site:
        stream = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with stream:
            await stream.send_all(GET)
            await read_answer(stream)
            began = time.monotonic()
            site.house.drain.begin()
            await site.stopped.wait()
            assert time.monotonic() - began < 5


@pytest.mark.parametrize("http2", [False, True])
async def test_a_client_that_stops_reading_does_not_hold_the_stop_up(
    monkeypatch: pytest.MonkeyPatch, http2: bool
) -> None:
    monkeypatch.setattr("web.guarded_tcp_server.STALLED_SECS", 0.3)
    monkeypatch.setattr("web.guarded_h2_protocol.STALLED_SECS", 0.3)
    monkeypatch.setattr("web.shield_last.LAST_SECS", 0.3)
    async with open_site(grace_secs=0.5) as site:
        for _ in range(12):
            await site.start(payload={"text": "x" * 1_000_000})
        client_socket = trio.socket.socket()
        client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await client_socket.connect(("127.0.0.1", site.port))
        stream = trio.SocketStream(client_socket)
        async with stream:
            if http2:
                await H2Client(stream).request("GET", "/api/v1/sagas")
            else:
                await stream.send_all(b"GET /api/v1/sagas HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await stream.receive_some(1)
            site.house.drain.begin()
            with trio.fail_after(5):
                await site.stopped.wait()


async def test_a_client_that_leaves_with_requests_behind_the_one_under_way_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_site(grace_secs=20) as site:
        reached, opened = trio.Event(), trio.Event()
        workflows = site.house.store.workflows

        async def gated() -> Any:
            reached.set()
            with trio.CancelScope(shield=True):
                await opened.wait()
            return await workflows()

        monkeypatch.setattr(site.house.store, "workflows", gated)
        stream = await trio.open_tcp_stream("127.0.0.1", site.port)
        await stream.send_all(GET * 3)
        await reached.wait()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
        await trio.aclose_forcefully(stream)
        opened.set()
        site.house.drain.begin()
        with trio.fail_after(10):
            await site.stopped.wait()


async def test_a_running_request_finishes_while_the_door_closes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, opened = trio.Event(), trio.Event()
    workflows = site.house.store.workflows

    async def gated() -> Any:
        reached.set()
        await opened.wait()
        return await workflows()

    monkeypatch.setattr(site.house.store, "workflows", gated)
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await site.client.get("/api/v1/workflows")).status_code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await reached.wait()
        site.house.drain.begin()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", site.port)
        opened.set()
    assert statuses == [200]


async def test_a_long_poll_is_answered_with_the_state_of_now_when_the_drain_begins(site: Site) -> None:
    site.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await site.start()
    answers: list[Any] = []

    async def wait() -> None:
        answers.append(await site.ended(saga_id))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        while not len(site.house.service._watchers):
            await trio.lowlevel.checkpoint()
        site.house.drain.begin()
    assert answers[0]["saga"]["status"] == "RUNNING"


async def test_a_long_poll_whose_client_leaves_is_forgotten(site: Site) -> None:
    site.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await site.start()
    stream = await trio.open_tcp_stream("127.0.0.1", site.port)
    watchers = site.house.service._watchers
    async with stream:
        await stream.send_all(f"GET /api/v1/sagas/{saga_id}?wait_secs=60 HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        with trio.fail_after(5):
            while not len(watchers):
                await trio.lowlevel.checkpoint()
    with trio.fail_after(5):
        while len(watchers):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("http2", [False, True])
async def test_a_start_whose_client_leaves_is_finished_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch, http2: bool
) -> None:
    create = site.house.store.create
    reached, opened = trio.Event(), trio.Event()

    async def gated(new: Any) -> Any:
        reached.set()
        await opened.wait()
        return await create(new)

    monkeypatch.setattr(site.house.store, "create", gated)
    with trio.fail_after(5):
        await ask_and_leave(site, http2, "/api/v1/sagas", b'{"workflow_name": "order"}', reached)
        opened.set()
        while not (found := (await site.client.get("/api/v1/sagas")).json()["sagas"]):
            pass
        detail: Any = await site.ended(found[0]["saga_id"])
    assert detail["saga"]["status"] == "COMPLETED"
    # The answer nobody takes is given up at once: over HTTP/2 hypercorn by itself would wait for the client.
    site.house.drain.begin()
    with trio.fail_after(3):
        await site.stopped.wait()


@pytest.mark.parametrize("http2", [False, True])
async def test_a_cancel_whose_client_leaves_is_finished_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch, http2: bool
) -> None:
    site.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await site.start()
    cancel = site.house.store.request_cancel_unless_terminal
    reached, opened = trio.Event(), trio.Event()

    async def gated(*args: Any) -> Any:
        reached.set()
        await opened.wait()
        return await cancel(*args)

    monkeypatch.setattr(site.house.store, "request_cancel_unless_terminal", gated)
    with trio.fail_after(5):
        await ask_and_leave(site, http2, f"/api/v1/sagas/{saga_id}/cancel", b"{}", reached)
        opened.set()
        detail: Any = await site.ended(saga_id)
    assert detail["saga"]["status"] == "CANCELLED"


async def ask_and_leave(site: Site, http2: bool, path: str, body: bytes, reached: trio.Event) -> None:
    """Sends a POST and, when the store has been reached, goes away; returns when the server has noticed."""
    stream = await trio.open_tcp_stream("127.0.0.1", site.port)
    async with stream:
        if http2:
            client = H2Client(stream)
            stream_id = await client.request("POST", path, body)
            await reached.wait()
            client.connection.reset_stream(stream_id)
            await client.send()
        else:
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
            await stream.send_all(head.encode() + body)
            await reached.wait()
    # A request that is answered after the connection was closed: the server has read the end of that one too.
    await site.client.get("/api/v1/workflows")


async def test_an_error_in_hypercorn_ends_one_connection_and_is_logged(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = await trio.open_tcp_stream("127.0.0.1", site.port)
    async with other:
        await other.send_all(GET)
        await read_answer(other)

        async def broken(self: Any, events: Any) -> None:
            raise KeyError("stream of the past")

        monkeypatch.setattr("hypercorn.protocol.h2.H2Protocol._handle_events", broken)
        stream = await trio.open_tcp_stream("127.0.0.1", site.port)
        async with stream:
            with caplog.at_level(logging.WARNING):
                await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
                with trio.fail_after(5):
                    await read_to_the_end(stream)
        assert "http_connection_failed" in caplog.text
        assert "stream of the past" in caplog.text
        await other.send_all(GET)
        assert (await read_answer(other)).startswith(b"HTTP/1.1 200")


async def test_the_guard_is_what_hypercorn_serves_with(site: Site) -> None:
    assert vars(hypercorn.trio.run)["TCPServer"] is GuardedTCPServer


async def test_a_port_that_is_taken_is_an_os_error(site: Site) -> None:
    app = create_app(site.house.service, authenticator=OpenAccess(), drain=Drain(), version="1")
    with pytest.raises(OSError, match=r"(?i)in use") as caught:
        await serve_rest(app, "127.0.0.1", site.port, shutdown_trigger=trio.sleep_forever)
    assert caught.value.errno == errno.EADDRINUSE


async def test_two_servers_share_a_port_when_told_to_and_ipv6_is_served(site: Site) -> None:
    app = create_app(site.house.service, authenticator=OpenAccess(), drain=Drain(), version="1")
    async with trio.open_nursery() as nursery:

        async def serve(host: str, port: int, task_status: trio.TaskStatus[int]) -> None:
            await serve_rest(
                app, host, port, shutdown_trigger=trio.sleep_forever, reuse_port=True, task_status=task_status
            )

        port = await nursery.start(serve, "127.0.0.1", 0)
        assert await nursery.start(serve, "127.0.0.1", port) == port
        try:
            six = await nursery.start(serve, "::1", 0)
        except OSError:
            pass  # no IPv6 here
        else:
            stream = await trio.open_tcp_stream("::1", six)
            async with stream:
                await stream.send_all(GET)
                assert (await read_answer(stream)).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()


async def test_the_head_of_an_answer_and_its_body_are_sent_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    send_all = trio.SocketStream.send_all

    async def noted(stream: trio.SocketStream, data: bytes | bytearray | memoryview) -> None:
        sent.append(bytes(data))
        await send_all(stream, data)

    monkeypatch.setattr(trio.SocketStream, "send_all", noted)
    answers = [await site.client.request(method, "/healthz") for method in ("GET", "HEAD", "GET")]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    heads = [data for data in sent if data.startswith(b"HTTP/1.1 ")]
    assert [head.partition(b"\r\n\r\n")[2] for head in heads] == [answer.content for answer in answers]
