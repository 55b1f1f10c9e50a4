"""What a configuration promises once it is read: who may call, and that no secret is shown."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from server.config import ConfigInvalid, Secret
from tests.server.config_files import AUTH, loaded, problems

pytestmark = pytest.mark.usefixtures("empty_folder")


# --- access ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST"])
def test_on_a_loopback_address_no_tokens_are_needed(host: str) -> None:
    loaded(f"server: {{host: '{host}'}}").refuse_open_access()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "saga.example.com", "localhost.example.com"])
def test_on_any_other_address_an_auth_section_is_needed(host: str) -> None:
    text = f"server: {{host: '{host}'}}\n"
    with pytest.raises(ConfigInvalid, match=r"server\.host: expected a loopback address, got .* or say --insecure"):
        loaded(text).refuse_open_access()
    loaded(text + AUTH).refuse_open_access()


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_a_secret_is_not_shown_by_anything_but_reveal() -> None:
    secret = Secret("hunter2")
    assert secret.reveal() == "hunter2"
    for text in (repr(secret), str(secret), f"{secret}", f"{[secret]}"):
        assert "hunter2" not in text
    for copying in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            copying(secret)
    assert secret == Secret("hunter2") != Secret("other")
    assert len({secret, Secret("hunter2")}) == 1


def test_a_configuration_that_is_printed_shows_no_secret() -> None:
    text = "database: {name: a, user: b, password: hunter2}\n"
    text += "kafka: {brokers: ['k:1'], security_protocol: SASL_SSL, sasl: {username: u, password: hunter2}}\n"
    config = loaded(text)
    assert "hunter2" not in repr(config)
    assert "hunter2" not in str(config)


@pytest.mark.parametrize(
    "text",
    [
        "database: postgresql://u:hunter2@h/db",
        "database: {name: a, user: b, password: !hunter2 x}",
        "database: {name: a, user: b, password: [hunter2]}",
        'database: {name: a, user: b, password: "hunter2\\n"}',
        "database: {name: a, user: b, host: 'u:hunter2@h'}",
        "database: {name: a, user: b, password: 2001-01-01, passwort: hunter2}",
        "database: {name: a, user: b, password: *hunter2}",
        "database: {name: a, user: b, password: hunter2: x}",
        "database: {name: a, user: b, password: '${PASSWORD', port: x}",
        "database: {name: a, user: b, port: '${PASSWORD}', ssl_mode: '${PASSWORD}'}",
        "server: {host: 'a ${PASSWORD}', port: '${PASSWORD}'}",
        "saga: '${PASSWORD}'",
        "services: ['${PASSWORD}']\nobservability: {log: {level: '${PASSWORD}'}}",
        "auth: {jwks_url: 'u:hunter2@x', issuer: a, audience: b}",
        "kafka: hunter2",
        "kafka: {brokers: ['u:hunter2@k:9092']}",
        "kafka: {brokers: ['kafka://u:hunter2@k:9092']}",
        "kafka: {brokers: 'u:hunter2@k:9092'}",
        "kafka: {brokers: ['k:1'], security_protocol: SASL_SSL, sasl: hunter2}",
        "database: {name: a, user: b, password: hunter2, password_file: none}",
    ],
)
def test_an_error_shows_no_secret(text: str) -> None:
    assert "hunter2" not in "\n".join(problems(text, PASSWORD="hunter2"))


def test_a_password_is_read_from_a_file_without_its_line_end() -> None:
    for content in ("p w\n", "p w\r\n", "p w"):
        Path("secret").write_bytes(content.encode())
        config = loaded("database: {name: a, user: b, password_file: secret}")
        assert config.database is not None
        assert config.database.password == Secret("p w")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("none", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("binary", "cannot be read: it is not UTF-8 text"),
        ("empty", "the file is empty"),
    ],
)
def test_a_password_file_that_has_no_password_is_refused(file: str, problem: str) -> None:
    Path("binary").write_bytes(b"\xff")
    Path("empty").write_bytes(b"\n")
    (found,) = problems(f"database: {{name: a, user: b, password_file: {file}}}")
    assert found.endswith(f"database.password_file: {problem}")


def test_a_password_and_a_password_file_together_are_refused() -> None:
    Path("secret").write_text("x")
    (found,) = problems("database: {name: a, user: b, password: x, password_file: secret}")
    assert found.endswith("database.password_file: expected password or password_file, got both")
