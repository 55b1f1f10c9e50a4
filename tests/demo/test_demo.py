"""The demo as a person runs it: a process, its output, its exit status, and what is left of it."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
USUAL_PORTS = {"REST": 8080, "gRPC": 50051, "inventory": 50061, "payment": 50062, "shipping": 50063}
LIMIT_SECS = 90
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


class Run:
    """One run of the demo. All its processes carry a mark in their environment."""

    def __init__(self, *command: str, **environment: str) -> None:
        self._mark = f"SAGA_DEMO_TEST={uuid.uuid4()}"
        name, value = self._mark.split("=")
        inherited = {key: text for key, text in os.environ.items() if key != "NO_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=inherited | {name: value} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit status, output, errors, when it has ended."""
        out, err = self.process.communicate(timeout=LIMIT_SECS)
        return self.process.returncode, out, err

    def read_until(self, text: str) -> str:
        """What it printed up to the line with `text`."""
        assert self.process.stdout is not None
        seen = ""
        for line in self.process.stdout:
            seen += line
            if text in line:
                return seen
        raise AssertionError(f"it ended without printing {text!r}:\n{seen}{self.end()[2]}")

    def pids(self) -> list[int]:
        """The processes that belong to this run and are alive."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue  # gone meanwhile, or somebody else's
                if self._mark.encode() in environment.split(b"\0"):
                    found.append(int(entry.name))
        return found


@pytest.fixture
def start() -> Iterator[type[Run]]:
    """Starts runs, and ends those that are still there."""
    with ExitStack() as stack:

        class Kept(Run):
            def __init__(self, *command: str, **environment: str) -> None:
                super().__init__(*command, **environment)
                stack.callback(self.process.communicate)
                stack.callback(self.process.kill)

        yield Kept


def shape(output: str) -> list[str]:
    """Its lines without what differs from run to run."""
    lines = [line for line in output.splitlines() if "is taken" not in line]
    return [" ".join(re.sub(r"[0-9a-f-]{36}|[0-9]+", "N", line).split()) for line in lines]


def with_payment(module: str) -> str:
    """A program that runs the demo with another payment service."""
    return (
        "import sys; from demo import run; "
        f"run.PARTICIPANTS['payment'] = ({module!r}, 50062); sys.exit(run.main(once=True))"
    )


def test_one_order_completes_one_is_undone_and_one_is_cancelled_half_way(start: type[Run]) -> None:
    status, out, err = start("-m", "server.cli", "demo", "--once").end()

    assert (status, err) == (0, "")
    headings = [line for line in out.splitlines() if line.startswith("Order ")]
    assert [line.split("->")[1].split()[0] for line in headings] == ["COMPLETED", "FAILED", "CANCELLED"]
    rows = [line.split() for line in out.splitlines() if line.startswith("  arrange-shipping")]
    assert rows[0][1] == "SUCCESS"
    assert rows[1][1:] == ["not", "called"]
    assert (rows[2][1], rows[2][4]) == ("FAILED", "SUCCESS")
    assert "FAILED_PRECONDITION: card declined" in out
    assert "stock 98" in out
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines()) <= 100
    (example,) = re.findall(r"```\n(Starting three.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shape(out) == shape(example)


def test_taken_ports_are_left_alone_and_the_json_report_names_the_others(start: type[Run]) -> None:
    with ExitStack() as stack:
        for port in USUAL_PORTS.values():
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                pass  # taken already, by something else on this machine
        status, out, err = start("-m", "demo", "--once", "--json").end()

    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["ok"] is True
    assert [order["saga"]["status"] for order in report["orders"]] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert report["ports"].keys() == USUAL_PORTS.keys()
    assert not set(report["ports"].values()) & set(USUAL_PORTS.values())
    assert report["ledgers"]["payment"]["kept_cents"] == 4998
    undone = [(log["step_name"], log["action"]) for log in report["orders"][2]["step_logs"]]
    assert undone[-3:] == [
        ("arrange-shipping", "COMPENSATE"),
        ("process-payment", "COMPENSATE"),
        ("reserve-inventory", "COMPENSATE"),
    ]


def test_a_participant_that_does_not_start_shows_its_last_words(start: type[Run]) -> None:
    status, _, err = start("-c", with_payment("demo.no_such_service")).end()

    assert status == 1
    assert "saga demo: payment ended with exit status 1" in err
    assert "No module named demo.no_such_service" in err
    assert "Traceback" not in err


def test_an_order_that_does_not_end_as_it_should_is_named(start: type[Run]) -> None:
    status, out, err = start("-c", with_payment("tests.demo.refusing_payment")).end()

    assert status == 1
    assert "FAILED_PRECONDITION: the till is closed" in out
    assert "order 1 (nothing goes wrong) ended FAILED, expected COMPLETED" in err
    assert "the ledger of payment says kept_cents 0, expected 4998" in err
    assert "Traceback" not in err


@needs_proc
@pytest.mark.parametrize("options", [["--once"], ["--once", "--json"]])
def test_it_ends_quietly_when_its_reader_has_gone(start: type[Run], options: list[str]) -> None:
    run = start("-m", "demo", *options)
    assert run.process.stdout is not None
    run.process.stdout.close()

    status, _, err = run.end()

    assert (status, err) == (1, "")
    assert run.pids() == []


@needs_proc
def test_it_stays_up_until_ctrl_c_and_leaves_nothing_behind(start: type[Run]) -> None:
    run = start("-m", "demo")
    shown = run.read_until("Ctrl-C stops everything.")
    assert len(run.pids()) == 5
    assert shown.count("curl -s") == 3

    run.process.send_signal(signal.SIGINT)

    status, _, err = run.end()
    assert (status, err) == (0, "")
    assert run.pids() == []


@needs_proc
def test_ctrl_c_before_the_orders_have_ended_is_an_interrupt(start: type[Run]) -> None:
    run = start("-m", "demo", "--once")
    run.read_until("inventory")

    run.process.send_signal(signal.SIGINT)

    status, _, err = run.end()
    assert (status, err) == (130, "")
    assert run.pids() == []


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has died")
def test_the_children_go_when_the_demo_is_killed(start: type[Run], tmp_path: Path) -> None:
    run = start("-m", "demo", TMPDIR=str(tmp_path))
    run.read_until("Order 1")
    children = [os.pidfd_open(pid) for pid in run.pids() if pid != run.process.pid]
    assert len(children) == 4

    run.process.kill()

    ends = time.monotonic() + 30
    for child in children:
        # A pidfd is readable when its process has ended.
        readable, _, _ = select.select([child], [], [], max(0.0, ends - time.monotonic()))
        os.close(child)
        assert readable


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_are_for_terminals_that_want_them(environment: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", "from demo.timeline import painted; print(painted('x', 'FAILED'))"],
            cwd=ROOT,
            env={key: text for key, text in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment,
            stdout=theirs,
            check=True,
        )
        assert (b"\x1b[31m" in os.read(ours, 1000)) is coloured
    finally:
        os.close(ours)
        os.close(theirs)
