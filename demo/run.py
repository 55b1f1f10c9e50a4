"""The demo: three participants and a server in processes of their own, and three orders.

One order completes, one is undone because the card is declined, one is cancelled half-way. The demo talks to the server
as any client does, over REST, and looks into the participants' ledgers at the end. It needs no database, no broker and
nothing installed besides the product.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from grpclib.client import Channel
from grpclib.exceptions import GRPCError, StreamTerminatedError

import workflows
from demo.children import Child, ChildFailed, pick_port
from demo.proto.orders_grpc import LedgerServiceStub
from demo.proto.orders_pb2 import LedgerRequest
from demo.timeline import elapsed_ms, painted, timeline

WORKFLOW = "order-fulfillment"
REST_PORT, GRPC_PORT = 8080, 50051
PARTICIPANTS: dict[str, tuple[str, int]] = {
    "inventory": ("demo.inventory", 50061),
    "payment": ("demo.payment", 50062),
    "shipping": ("demo.shipping", 50063),
}
"""Module and usual port of each."""

ORDER_SECS = 60.0
"""How long an order may take; each takes well under a second unless the machine is busy."""


class Order(NamedTuple):
    """One order, how it has to end, and, for one to be cancelled, the line a participant prints when it is half-way."""

    title: str
    payload: dict[str, Any]
    expected: str
    cancel_after: str | None = None


ORDERS = (
    Order(
        "nothing goes wrong",
        {"order_id": "A-1001", "sku": "lamp", "quantity": 2, "amount_cents": 4998, "card": "valid"},
        "COMPLETED",
    ),
    Order(
        "the card is declined",
        {"order_id": "A-1002", "sku": "lamp", "quantity": 1, "amount_cents": 2499, "card": "declined"},
        "FAILED",
    ),
    Order(
        "cancelled while the carrier takes its time",
        {
            "order_id": "A-1003",
            "sku": "lamp",
            "quantity": 3,
            "amount_cents": 7497,
            "card": "valid",
            "ship_delay_secs": 3600,
        },
        "CANCELLED",
        cancel_after="asking the carrier about A-1003",
    ),
)

BALANCED = {
    "inventory": {"stock": 98, "reserved": 2},
    "payment": {"kept_cents": 4998},
    "shipping": {"booked": 1},
}
"""What the ledgers hold when only the first order has left a trace."""


class Failed(Exception):
    """The demo cannot go on; the text says why."""


class ReaderGone(Exception):
    """Whoever read our output has stopped (`... | head`); nothing is left to say to it."""


class Rest:
    """The server's REST API, one connection a call."""

    def __init__(self, port: int) -> None:
        self.port = port

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer. `Failed`: any status but 2xx; `OSError`, `HTTPException`: no server there, or it went."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ORDER_SECS + 5)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if not 200 <= response.status < 300:
            raise Failed(f"{method} {path} answered {response.status}: {answer.decode(errors='replace')[:300]}")
        return json.loads(answer)

    def is_ready(self) -> bool:
        try:
            self.call("GET", "/readyz")
        except (OSError, Failed, http.client.HTTPException):
            return False
        return True


class Calls:
    """The file all participants print to, so that their lines stand in the order they were written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._file = path.open(encoding="utf-8")
        self._seen = ""

    def new_lines(self) -> list[str]:
        """Whole lines since the last time."""
        *lines, self._seen = (self._seen + self._file.read()).split("\n")
        return lines

    def holds(self, text: str) -> bool:
        return text in self.path.read_text(encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class Demo:
    """What is running, and the report so far."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._children: list[Child] = []
        self._calls = Calls(folder / "calls.log")
        self.ports: dict[str, int] = {}
        self.report: dict[str, Any] = {"ok": False, "ports": self.ports, "orders": [], "ledgers": {}, "problems": []}

    # --- processes ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts everything and returns when the server is ready."""
        usual = {name: port for name, (_, port) in PARTICIPANTS.items()} | {"REST": REST_PORT, "gRPC": GRPC_PORT}
        for name, port in usual.items():
            self.ports[name] = pick_port(port)
            if self.ports[name] != port:
                self._say(f"Port {port} is taken: {name} uses {self.ports[name]} instead.")
        self._say("Starting three participants and the server ...")
        env = _clean_environment()
        for name, (module, _) in PARTICIPANTS.items():
            command = [sys.executable, "-m", module, "--port", str(self.ports[name])]
            self._add(name, command, env, calls=self._calls.path)
        command = [sys.executable, "-m", "server.cli", "serve", "--config", str(self._write_config())]
        server = self._add("server", command, env)
        for child in self._children[:-1]:
            address = f"127.0.0.1:{self.ports[child.name]}"
            secs = child.wait_until(partial(self._calls.holds, f"listening on {address}"))
            self._say(f"  {child.name:<9}  {address:<15}  ready after {secs:.1f} s")
        secs = server.wait_until(self.rest.is_ready)
        self._say(f"  {'server':<9}  127.0.0.1:{self.ports['REST']:<5}  ready after {secs:.1f} s")
        self._calls.new_lines()

    def _add(self, name: str, command: list[str], env: dict[str, str], calls: Path | None = None) -> Child:
        child = Child(name, command, log=self._folder / f"{name}.log", env=env, calls=calls)
        self._children.append(child)
        return child

    def _write_config(self) -> Path:
        """JSON, which is YAML too. Its own file, so that the demo shows the same whatever config/ holds."""
        config = {
            "server": {"host": "127.0.0.1", "port": self.ports["REST"], "grpc_port": self.ports["gRPC"]},
            "services": {name: {"host": "127.0.0.1", "port": self.ports[name]} for name in PARTICIPANTS},
            "saga": {
                "workflow_dir": str(Path(workflows.__file__).parent),
                "data_dir": str(self._folder / "data"),
                "shutdown_grace_secs": 2,
            },
        }
        path = self._folder / "config.yaml"
        path.write_text(json.dumps(config, indent=2))
        return path

    def dead_child(self) -> str | None:
        """What a process that should be running ended with; None: all run."""
        try:
            for child in self._children:
                child.check()
        except ChildFailed as error:
            return str(error)
        return None

    def stop(self) -> None:
        """Ends the server, then the participants; bounded. Ctrl-C again changes nothing."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for child in reversed(self._children):
            child.ask_to_stop()
            child.wait_until_gone()
        self._calls.close()

    @property
    def rest(self) -> Rest:
        return Rest(self.ports["REST"])

    # --- orders ------------------------------------------------------------------------------------------------------

    def run_orders(self) -> None:
        """Runs the orders one after the other, shows each, then compares the ledgers with what they must hold."""
        steps = self.rest.call("GET", f"/api/v1/workflows/{WORKFLOW}")["step_names"]
        for number, order in enumerate(ORDERS, 1):
            detail = self._run(order)
            saga, logs = detail["saga"], detail["step_logs"]
            self._show(number, order, saga, logs, steps)
            self.report["orders"].append({"order": order.title, "expected": order.expected, **detail})
            if saga["status"] != order.expected:
                self.problem(f"order {number} ({order.title}) ended {saga['status']}, expected {order.expected}")
        self._compare_ledgers()
        self.report["ok"] = not self.report["problems"]

    def _run(self, order: Order) -> Any:
        rest = self.rest
        started = rest.call(
            "POST",
            "/api/v1/sagas",
            {"workflow_name": WORKFLOW, "payload": order.payload, "correlation_id": order.payload["order_id"]},
        )
        path = f"/api/v1/sagas/{started['saga_id']}"
        ends = time.monotonic() + ORDER_SECS
        if order.cancel_after is not None:
            while not self._calls.holds(order.cancel_after):
                detail = rest.call("GET", path)
                if detail["saga"]["status"] in ("COMPLETED", "FAILED", "CANCELLED") or time.monotonic() > ends:
                    return detail  # it never got half-way; what it ended as is told by the caller
                time.sleep(0.02)
            rest.call("POST", f"{path}/cancel")
        return rest.call("GET", f"{path}?wait_secs={ORDER_SECS:g}")

    def _show(self, number: int, order: Order, saga: Any, logs: Any, steps: list[str]) -> None:
        took = elapsed_ms(saga["created_at"], saga["updated_at"])
        status = painted(saga["status"], saga["status"])
        self._say(f"\nOrder {number}: {order.title}   ->   {status} after {took} ms")
        self._say(f"  saga {saga['saga_id']}\n")
        for line in timeline(steps, logs):
            self._say(line)
        self._say("\n  what the participants printed:")
        for line in self._calls.new_lines():
            self._say(f"    {line}")

    def _compare_ledgers(self) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            ledgers = runner.run(_read_ledgers({name: self.ports[name] for name in PARTICIPANTS}))
        self.report["ledgers"] = ledgers
        self._say("\nLedgers: only the order that completed has left a trace")
        for name, entries in ledgers.items():
            self._say(f"  {name:<9}  " + "   ".join(f"{key} {value}" for key, value in entries.items()))
            for key, value in BALANCED[name].items():
                if entries[key] != value:
                    self.problem(f"the ledger of {name} says {key} {entries[key]}, expected {value}")

    def problem(self, text: str) -> None:
        self.report["problems"].append(text)

    # --- staying up --------------------------------------------------------------------------------------------------

    def stay(self) -> None:
        """Shows what participants print until something ends: Ctrl-C (KeyboardInterrupt) or a child (`ChildFailed`)."""
        base = f"http://127.0.0.1:{self.ports['REST']}/api/v1"
        last = self.report["orders"][-1]["saga"]["saga_id"]
        payload = json.dumps({"workflow_name": WORKFLOW, "payload": ORDERS[0].payload | {"order_id": "A-1004"}})
        self._say(f"\nPages http://127.0.0.1:{self.ports['REST']}/")
        self._say(f"REST  {base}    gRPC  127.0.0.1:{self.ports['gRPC']}")
        self._say("Go on with:")
        self._say(f"  curl -s '{base}/sagas?page_size=5'")
        self._say(f"  curl -s {base}/sagas/{last}")
        self._say(f"  curl -s {base}/sagas -H 'Content-Type: application/json' \\\n    -d '{payload}'")
        self._say("Ctrl-C stops everything.")
        while True:
            for child in self._children:
                child.check()
            for line in self._calls.new_lines():
                self._say(f"    {line}")
            time.sleep(0.2)


def main(*, once: bool = False, as_json: bool = False) -> int:
    """Runs the demo; the exit status: 0, 1 when an order or a process did not do as it should, 130 when it was
    interrupted before the orders had ended."""
    if as_json and not once:
        print("saga demo: --json needs --once", file=sys.stderr)
        return 2
    try:
        return _main(once, as_json)
    except ReaderGone:
        # What is still in the buffer is written when the interpreter ends, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(once: bool, as_json: bool) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="saga-demo-") as folder:
        demo = Demo(Path(folder), _silent if as_json else _print)
        ended = False
        try:
            demo.start()
            demo.run_orders()
            ended = True
            if not once and demo.report["ok"]:
                demo.stay()
        except KeyboardInterrupt:
            if not ended:
                return 130
            _print("\nStopping.")
        except (ChildFailed, Failed, OSError, http.client.HTTPException, GRPCError, StreamTerminatedError) as error:
            demo.problem(demo.dead_child() or str(error) or type(error).__name__)
            demo.report["ok"] = False
        finally:
            demo.stop()
    if as_json:
        _print(json.dumps(demo.report, indent=2))
    for problem in demo.report["problems"]:
        print(f"saga demo: {problem}", file=sys.stderr)
    return 0 if demo.report["ok"] else 1


async def _read_ledgers(ports: Mapping[str, int]) -> dict[str, dict[str, int]]:
    ledgers = {}
    for name, port in ports.items():
        async with Channel("127.0.0.1", port) as channel:
            ledger = await LedgerServiceStub(channel).Read(LedgerRequest(), timeout=5)
            ledgers[name] = dict(sorted(ledger.entries.items()))
    return ledgers


def _clean_environment() -> dict[str, str]:
    """Ours, without what would point the server at a configuration or a database of the user's."""
    own = ("CONFIG_PATH", "DATABASE_URL")
    environment = {key: value for key, value in os.environ.items() if key not in own and not key.startswith("SAGA__")}
    # Found from the folder that holds the packages, wherever the demo is called from.
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise ReaderGone from None


def _silent(line: str) -> None:
    pass
