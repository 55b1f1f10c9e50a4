"""Serves one participant of the demo: its service, its ledger, health and reflection, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from grpclib.health.check import ServiceStatus
from grpclib.health.service import Health
from grpclib.reflection.service import ServerReflection
from grpclib.server import Server, Stream

from demo.proto.orders_grpc import LedgerServiceBase
from demo.proto.orders_pb2 import Ledger, LedgerRequest

if TYPE_CHECKING:
    from grpclib._typing import IServable


def say(name: str, line: str) -> None:
    """One line about one call."""
    print(f"{name:<9}  {line}", flush=True)


def main(name: str, service: IServable, read_ledger: Callable[[], Mapping[str, int]]) -> int:
    """The command line of a participant; the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m demo.{name}", description=f"The {name} service of the demo.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free port")
    options = parser.parse_args()
    try:
        listener = _listen(options.host, options.port)
    except (OSError, OverflowError) as error:
        print(f"{name}: cannot listen on {options.host}:{options.port}: {error}", file=sys.stderr)
        return 1
    asyncio.run(_serve(name, service, read_ledger, listener))
    return 0


def _listen(host: str, port: int) -> socket.socket:
    # Not socket.create_server(): that leaves the protocol at 0, and asyncio turns Nagle's algorithm off only where it
    # is IPPROTO_TCP. With it on, every other answer waits 40 ms for an acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


async def _serve(
    name: str, service: IServable, read_ledger: Callable[[], Mapping[str, int]], listener: socket.socket
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = ServiceStatus()
    serving.set(True)
    services: list[IServable] = [service, _LedgerService(read_ledger), Health({service: [serving]})]
    server = Server(ServerReflection.extend(services))
    await server.start(sock=listener)
    host, port = listener.getsockname()[:2]
    say(name, f"listening on {host}:{port}")
    await stop.wait()
    server.close()


class _LedgerService(LedgerServiceBase):
    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    async def Read(self, stream: Stream[LedgerRequest, Ledger]) -> None:
        await stream.recv_message()
        await stream.send_message(Ledger(entries=self._read()))
