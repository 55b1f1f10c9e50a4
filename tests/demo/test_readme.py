"""The README's own service and workflow, followed to the letter in an empty directory."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.server_process import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = README[README.index("## Your own workflow") : README.index("## Beside Temporal")]
FILES: dict[str, str] = dict(re.findall(r"`([\w./-]+\.(?:proto|py|yaml))`:\n\n```\w+\n(.*?)```", GUIDE, re.DOTALL))
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
COMMANDS = "".join(text for language, text in BLOCKS if not language).replace("\\\n", "").splitlines()


class Guide:
    """Runs the README's lines; only the ports are others, as the usual ones may be in use here."""

    def __init__(self, folder: Path) -> None:
        self.port, grpc_port, hotel_port = free_ports(3)
        self._folder = folder
        self._running: list[subprocess.Popen[str]] = []
        for name, text in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text.replace("50070", str(hotel_port)))
        self._environment = os.environ | {
            "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")]),
            "SAGA__SERVER__PORT": str(self.port),
            "SAGA__SERVER__GRPC_PORT": str(grpc_port),
        }

    def command(self, start: str) -> list[str]:
        """The one line of the README that begins so, run by the interpreter of the tests."""
        (line,) = [line for line in COMMANDS if line.startswith(start)]
        words = shlex.split(line.removesuffix("&"))
        program = {"python": [sys.executable], "saga": [sys.executable, "-m", "server.cli"]}[words[0]]
        return [*program, *words[1:]]

    def run(self, start: str) -> str:
        done = subprocess.run(
            self.command(start), cwd=self._folder, env=self._environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def keep_running(self, start: str, until: str | None = None) -> None:
        process = subprocess.Popen(
            self.command(start), cwd=self._folder, env=self._environment, stderr=subprocess.PIPE, text=True
        )
        self._running.append(process)
        assert process.stderr is not None
        if until is not None:
            assert any(until in line for line in process.stderr)

    def stop(self) -> None:
        for process in reversed(self._running):
            process.terminate()
            process.communicate()

    def ask(self, method: str, path: str, body: str | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


@pytest.fixture
def guide(tmp_path: Path) -> Iterator[Guide]:
    guide = Guide(tmp_path)
    yield guide
    guide.stop()


def test_the_guide_to_a_first_workflow_works(guide: Guide) -> None:
    assert set(FILES) == {"hotel.proto", "hotel.py", "workflows/two-rooms.yaml", "config.yaml"}
    guide.run("python -m grpc_tools.protoc")
    guide.keep_running("python hotel.py")
    assert guide.run("saga workflow check") == ""
    guide.keep_running("saga serve", until='"event": "ready"')

    saga_id, details = "", []
    for words in [words for words in map(shlex.split, COMMANDS) if words[0] == "curl"]:
        (url,) = [word for word in words if word.startswith("http")]
        path = url.removeprefix("http://127.0.0.1:8080")
        if "-d" in words:
            saga_id = guide.ask("POST", path, words[words.index("-d") + 1])["saga_id"]
        else:
            details.append(guide.ask("GET", re.sub("THE_[A-Z]+_ID", saga_id, path)))

    assert [detail["saga"]["status"] for detail in details] == ["COMPLETED", "FAILED"]
    assert details[1]["saga"]["error_message"] == "step second-room failed: FAILED_PRECONDITION: no room left"
    assert details[1]["saga"]["error_message"] in README
    assert [(log["step_name"], log["action"]) for log in details[1]["step_logs"]][-1] == ("first-room", "COMPENSATE")
