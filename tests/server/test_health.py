"""`saga health` against real servers, with and without TLS, and against none."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from tests.support.certificates import certificate
from tests.support.server_process import START_SECS, ServerProcess, server_process

ROOT = Path(__file__).parents[2]

Asked = tuple[int, str, str]
Ask = Callable[..., Asked]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """`ask(server, *arguments)`: exit status, and what is printed on both streams."""

    def run(server: ServerProcess, *arguments: str) -> Asked:
        status = main(["health", "--config", str(server.config), *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def listening(server: ServerProcess, tls: dict[str, Any]) -> None:
    """Starts it with `tls` and returns when its doors are open."""
    config = json.loads(server.config.read_text())
    config["server"]["tls"] = tls
    server.config.write_text(json.dumps(config))
    server.spawn()
    give_up_at = time.monotonic() + START_SECS
    while " ready " not in server.log:
        assert server.process.poll() is None, server.log
        assert time.monotonic() < give_up_at, server.log
        time.sleep(0.02)  # a process of its own: nothing to wait on but what it shows


def test_a_server_in_cleartext_is_asked_and_one_that_is_gone_is_told(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with server_process(tmp_path, {}) as server:
        server.start()
        url = f"http://127.0.0.1:{server.port}"
        assert ask(server) == (0, f'{url}/healthz: {{"status":"ok"}}\n', "")
        status, out, _ = ask(server, "--ready", "--json")
        printed = json.loads(out)
        assert (status, printed["url"], printed["healthy"]) == (0, f"{url}/readyz", True)
        assert json.loads(printed["told"])["checks"]["database"] == "ok"

        # As the image does it, on all addresses.
        command = re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
        assert command is not None
        monkeypatch.setenv("CONFIG_PATH", str(server.config))
        monkeypatch.setenv("SAGA__SERVER__HOST", "0.0.0.0")
        assert main(json.loads(command[1])[1:]) == 0
        assert url in capsys.readouterr().out

        server.kill()
        assert ask(server) == (1, "", f"saga: {url}/healthz: Connection refused\n")
        assert json.loads(ask(server, "--json")[1]) == {
            "url": f"{url}/healthz",
            "healthy": False,
            "told": "Connection refused",
        }


def test_a_server_with_tls_is_asked_whatever_name_its_certificate_is_for(tmp_path: Path, ask: Ask) -> None:
    made = certificate(tmp_path, "saga.example")
    with server_process(tmp_path, {}) as server:
        tls = {"cert_file": made.cert_file, "key_file": made.key_file, "client_ca_file": made.ca_file}
        listening(server, tls)
        assert ask(server)[:2] == (0, f'https://127.0.0.1:{server.port}/healthz: {{"status":"ok"}}\n')
        assert ask(server, "--ready")[0] == 0
        assert "tls_handshake_failed" not in server.log


def test_a_server_that_does_not_take_its_own_certificate_as_a_clients_is_alive_by_its_handshake(
    tmp_path: Path, ask: Ask
) -> None:
    made, stranger = certificate(tmp_path), certificate(tmp_path, by="other", called="stranger")
    with server_process(tmp_path, {}) as server:
        tls = {"cert_file": made.cert_file, "key_file": made.key_file, "client_ca_file": stranger.ca_file}
        listening(server, tls)
        status, out, _ = ask(server)
        assert (status, "alive" in out) == (0, True)
        assert ask(server, "--ready")[0] == 1
        server.kill()
        assert ask(server)[0] == 1


def test_a_configuration_that_cannot_be_used_and_a_port_nobody_knows_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("server: {port: x}")
    assert main(["health", "--config", str(config)]) == 1
    assert capsys.readouterr().err.startswith(f"saga: {config}:1:16: server.port: ")
    config.write_text("server: {port: 0}")
    assert main(["health", "--config", str(config)]) == 1
    assert "server.port is 0" in capsys.readouterr().err
    config.write_text(f"server: {{host: {'a' * 64}, port: 1}}")  # no name has so long a part
    assert main(["health", "--config", str(config)]) == 1
    assert "label" in capsys.readouterr().err
