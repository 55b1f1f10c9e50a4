"""What each section takes and refuses, key by key, and that every fault is told with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpc.settings import ServiceTls
from server.config import (
    AppConfig,
    ClientAuth,
    Config,
    LimitsConfig,
    LogFormat,
    LogLevel,
    ObservabilityConfig,
    SagaConfig,
    SaslMechanism,
    Secret,
    SecurityProtocol,
    ServerConfig,
    ServerTls,
    SslMode,
)
from tests.server.config_files import KAFKA, loaded, problems

pytestmark = pytest.mark.usefixtures("empty_folder")


def at(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


# --- every section ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "server:\nsaga:\nservices:\napp:\nobservability:\n"])
def test_what_is_left_out_has_its_default(text: str) -> None:
    config = loaded(text)
    assert config == Config(source=Path("c.yaml"))
    assert config.app == AppConfig(name="saga", environment="development")
    assert config.server == ServerConfig(host="127.0.0.1", port=8080, grpc_port=50051)
    assert config.saga == SagaConfig(
        max_concurrent=100,
        workflow_dir=Path("workflows"),
        data_dir=Path("data"),
        lease_secs=15,
        park_after_secs=30,
        max_payload_bytes=1048576,
        shutdown_grace_secs=30,
        retention_days=30,
    )
    assert config.observability == ObservabilityConfig()
    assert (config.database, config.kafka, config.auth, config.services) == (None, None, None, {})


SECTIONS = {
    "database": "  name: saga\n  user: me\n",
    "kafka": "  brokers: ['k:9092']\n",
    "auth": "  jwks_url: https://a/jwks\n  issuer: i\n  audience: a\n",
    "services.payment": "    host: h\n    port: 1\n",
}


def with_key(path: str, value: str) -> str:
    """A file that sets one key, with whatever the section needs besides."""
    *sections, key = path.split(".")
    lines = [f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections)]
    needed = SECTIONS.get(".".join(sections), "").splitlines(keepends=True)
    lines += [line for line in needed if not line.strip().startswith(f"{key}:")]
    return "".join(lines) + f"{'  ' * len(sections)}{key}: {value}\n"


@pytest.mark.parametrize(
    ("path", "value", "read"),
    [
        ("app.name", "orders", "orders"),
        ("app.environment", "staging", "staging"),
        ("server.host", "0.0.0.0", "0.0.0.0"),
        ("server.host", "'::1'", "::1"),
        ("server.port", "0", 0),
        ("server.port", "65535", 65535),
        ("server.grpc_port", "0", 0),
        ("server.limits", "{max_requests: 5}", LimitsConfig(max_requests=5)),
        ("server.limits.max_connections", "1", 1),
        ("server.limits.max_starts", "100", 100),
        (
            "server.tls",
            "{cert_file: c, key_file: k, client_ca_file: a, client_auth: optional}",
            ServerTls(cert_file="c", key_file="k", client_ca_file="a", client_auth=ClientAuth.OPTIONAL),
        ),
        ("server.tls", "{cert_file: c, key_file: k}", ServerTls(cert_file="c", key_file="k")),
        ("database.host", "db", "db"),
        ("database.host", "/run/postgresql", "/run/postgresql"),
        ("database.port", "65535", 65535),
        ("database.name", "orders", "orders"),
        ("database.user", "'12'", "12"),
        ("database.password", "'p w'", Secret("p w")),
        ("database.ssl_mode", "verify-full", SslMode.VERIFY_FULL),
        ("database.ssl_root_cert", "ca.pem", "ca.pem"),
        ("database.max_open_conns", "50", 50),
        ("database.max_idle_conns", "0", 0),
        ("database.conn_max_lifetime", "90", 90.0),
        ("database.conn_max_lifetime", "500ms", 0.5),
        ("database.conn_max_lifetime", "5m", 300.0),
        ("database.conn_max_lifetime", "1.5h", 5400.0),
        ("database.conn_max_lifetime", "0", 0.0),
        ("services.payment.host", "10.0.0.1", "10.0.0.1"),
        ("services.payment.port", "65535", 65535),
        ("services.payment.codec", "json", "json"),
        ("services.payment.descriptor_set", "pay.pb", "pay.pb"),
        ("services.payment.tls", "true", ServiceTls()),
        ("services.payment.tls", "false", None),
        (
            "services.payment.tls",
            "{ca_file: ca.pem, server_name: pay}",
            ServiceTls(ca_file="ca.pem", server_name="pay"),
        ),
        ("saga.max_concurrent", "1", 1),
        ("saga.workflow_dir", "/etc/w", Path("/etc/w")),
        ("saga.data_dir", "/var/lib/saga", Path("/var/lib/saga")),
        ("saga.data_dir", "':memory:'", Path(":memory:")),
        ("saga.lease_secs", "2.5", 2.5),
        ("saga.park_after_secs", "0", 0.0),
        ("saga.max_payload_bytes", "67108864", 67108864),
        ("saga.shutdown_grace_secs", "0", 0.0),
        ("saga.retention_days", "0", 0.0),
        ("saga.retention_days", "0.5", 0.5),
        ("saga.retention_days", "36500", 36500.0),
        ("auth.jwks_url", "http://a/b?c=d", "http://a/b?c=d"),
        ("auth.issuer", "https://issuer", "https://issuer"),
        ("auth.audience", "orders", "orders"),
        ("auth.jwks_cache_ttl_secs", "60", 60.0),
        ("saga.audit_retention_days", "365", 365.0),
        ("observability.log.level", "debug", LogLevel.DEBUG),
        ("observability.log.format", "json", LogFormat.JSON),
        ("observability.otlp.endpoint", "http://collector:4318/otlp", "http://collector:4318/otlp"),
        ("observability.redact", "[card, customer.card.number]", ("card", "customer.card.number")),
        ("observability.redact", "[]", ()),
    ],
)
def test_every_key_is_read(path: str, value: str, read: Any) -> None:
    assert at(loaded(with_key(path, value)), path) == read


PORT = "int from 1 to 65535"
LISTEN = "int from 0 to 65535"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("app.name", "3", "expected string of 1 to 255 characters, got 3; put it in quotes"),
        ("app.environment", "[]", "expected string of 1 to 255 characters, got a list"),
        ("server.host", "a b", "expected a host name or address, got the string 'a b'"),
        ("server.host", "1", "expected a host name or address, got 1; put it in quotes"),
        ("server.port", "-1", f"expected {LISTEN}, got -1"),
        ("server.port", "65536", f"expected {LISTEN}, got 65536"),
        ("server.port", "'80'", f"expected {LISTEN}, got the string '80'"),
        ("server.port", "80.0", f"expected {LISTEN}, got 80.0"),
        ("server.port", "true", f"expected {LISTEN}, got true"),
        ("server.limits.max_connections", "0", "expected int from 1 to 100000, got 0"),
        ("server.limits.max_requests", "many", "expected int from 1 to 1000000, got the string 'many'"),
        ("server.limits.max_starts", "0", "expected int from 1 to 1000000, got 0"),
        ("server.grpc_port", "65536", f"expected {LISTEN}, got 65536"),
        ("server.grpc_port", "8080", "expected another port than server.port, got 8080 for both"),
        ("database.port", "0", f"expected {PORT}, got 0"),
        ("database.name", "''", "expected string of 1 to 63 characters, got 0"),
        ("database.user", "yes", "expected string of 1 to 63 characters, got yes, a boolean to some YAML readers"),
        ("database.password", "12345", "expected string of 1 to 4096 characters, got a value that is not shown"),
        (
            "database.ssl_mode",
            "on",
            "expected disable or allow or prefer or require or verify-ca or verify-full, got on",
        ),
        ("database.max_open_conns", "0", "expected int from 5 to 10000, got 0"),
        ("database.max_idle_conns", "-1", "expected int from 0 to 10000, got -1"),
        ("database.max_idle_conns", "11", "expected at most max_open_conns (10), got 11"),
        ("database.conn_max_lifetime", "-1", "expected number from 0 to 31536000, got -1"),
        ("database.conn_max_lifetime", "5 m", "expected a number of seconds or a duration as 90s, 5m, 1h, got the "),
        ("database.conn_max_lifetime", "900d", "expected at most 365d, got the string '900d'"),
        ("kafka.brokers", "[]", "expected a list of 1 or more host:port, got an empty one"),
        ("kafka.brokers", "k:9092", "expected a list of 1 or more host:port, got a string"),
        ("kafka.security_protocol", "TLS", "expected PLAINTEXT or SSL or SASL_PLAINTEXT or SASL_SSL, got the string"),
        ("services.payment.host", "h/x", "expected a host name or address, got the string 'h/x'"),
        ("services.payment.port", "0", f"expected {PORT}, got 0"),
        ("services.payment.codec", "xml", "expected protobuf or json, got the string 'xml'"),
        ("services.payment.descriptor_set", "3", "expected string of 1 to 4096 characters, got 3"),
        ("services.payment.tls", "maybe", "expected true or false, got the string 'maybe'"),
        ("services.payment.tls", "yes", "expected true or false, got yes, a boolean to some YAML readers"),
        ("services.payment.tls", "{cert_file: c.pem}", "expected cert_file and key_file together"),
        ("database.ssl_key", "k.pem", "expected ssl_cert and ssl_key together"),
        ("kafka.tls", "{ca_file: c.pem}", "is not used with security_protocol PLAINTEXT; expected SSL or SASL_SSL"),
        ("server.tls", "true", "expected a map, got true; leave the key out to do without"),
        ("saga.max_concurrent", "0", "expected int from 1 to 1000000, got 0"),
        ("saga.workflow_dir", "1", "expected string of 1 to 4096 characters, got 1"),
        ("saga.data_dir", "{}", "expected string of 1 to 4096 characters, got a map"),
        ("saga.lease_secs", "0", "expected number from 1 to 3600, got 0"),
        ("saga.park_after_secs", "-1", "expected number from 0 to 86400, got -1"),
        ("saga.park_after_secs", ".inf", "expected number from 0 to 86400, got .inf, which is not finite"),
        ("saga.max_payload_bytes", "1", "expected int from 2 to 67108864, got 1"),
        ("saga.shutdown_grace_secs", "x", "expected number from 0 to 3600, got the string 'x'"),
        ("saga.retention_days", "-1", "expected number from 0 to 36500, got -1"),
        ("saga.retention_days", "36501", "expected number from 0 to 36500, got 36501"),
        ("saga.retention_days", ".inf", "expected number from 0 to 36500, got .inf, which is not finite"),
        ("auth.jwks_url", "ftp://a", "expected an http(s) URL, got a value that is not shown"),
        ("auth.issuer", "''", "expected string of 1 to 2048 characters, got 0"),
        ("auth.audience", "null", "expected string of 1 to 2048 characters, got null"),
        ("auth.jwks_cache_ttl_secs", "0", "expected number from 1 to 604800, got 0"),
        ("observability.redact", "card", "expected a list of names or dotted paths of fields, got the string 'card'"),
        ("observability.log.level", "loud", "expected debug or info or warning or error, got the string 'loud'"),
        ("observability.log.format", "xml", "expected auto or json or text, got the string 'xml'"),
    ],
)
def test_every_key_is_refused_outside_its_range_with_file_line_and_column(path: str, value: str, message: str) -> None:
    text = with_key(path, value)
    (problem,) = problems(text)
    line = text.count("\n")
    column = text.splitlines()[-1].index(": ") + 3
    assert problem.startswith(f"c.yaml:{line}:{column}: {path}: {message}")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("database: {}", ["database.name", "database.user"]),
        ("kafka: {}", ["kafka.brokers"]),
        ("auth: {}", ["auth.jwks_url", "auth.issuer", "auth.audience"]),
        ("services: {payment: {}}", ["services.payment.host", "services.payment.port"]),
        ("server: {tls: {}}", ["server.tls.cert_file", "server.tls.key_file"]),
        ("kafka: {brokers: ['k:1'], security_protocol: SASL_SSL}", ["kafka.sasl"]),
        ("kafka: {brokers: ['k:1'], security_protocol: SASL_SSL, sasl: {password: x}}", ["kafka.sasl.username"]),
    ],
)
def test_what_a_section_needs_is_required(text: str, missing: list[str]) -> None:
    found = problems(text)
    assert [problem.split(": ")[1] for problem in found] == missing
    assert all("is required" in problem for problem in found)


@pytest.mark.parametrize("section", ["database", "kafka", "auth"])
def test_an_empty_section_does_not_count_as_left_out_where_that_would_switch_something_off(section: str) -> None:
    assert problems(f"{section}:\n") == [
        f"c.yaml:1:{len(section) + 2}: {section}: expected a map, got null; leave the key out to do without"
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sever: {}", "c.yaml:1:1: sever: unknown key; did you mean server?"),
        (
            "server: {tls: {cert_file: c, key_file: k, client_auth: required}}",
            "c.yaml:1:56: server.tls.client_auth: expected client_ca_file with it: the authorities of the clients",
        ),
        ("server: {prot: 1}", "c.yaml:1:10: server.prot: unknown key; did you mean port?"),
        ("saga: {lease: 1}", "c.yaml:1:8: saga.lease: unknown key; did you mean lease_secs?"),
        (
            "services: {pay: {host: h, port: 1, x: 1}}",
            "c.yaml:1:36: services.pay.x: unknown key; known: codec, descriptor_set, host, port, tls",
        ),
        (
            "services: {pay: {host: h, port: 1, tls: {ca: 1}}}",
            "c.yaml:1:42: services.pay.tls.ca: unknown key; known: ca_file, cert_file, key_file, server_name",
        ),
        (
            "observability: {redact: [a..b]}",
            "c.yaml:1:26: observability.redact[0]: expected the name of a field, or a path of names with dots between"
            " them, got the string 'a..b'",
        ),
        ("observability: {log: {color: x}}", "c.yaml:1:23: observability.log.color: unknown key; known: format, level"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_known_one(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_every_error_is_reported_at_once_in_the_order_of_the_file() -> None:
    text = """\
server:
  port: http
  host: [a]
saga: {max_concurent: 5}
services:
  payment: {host: h, port: 99999}
  shipping: 50063
database: {name: x}
"""
    assert problems(text, SAGA__SAGA__LEASE_SECS="0") == [
        "c.yaml:2:9: server.port: expected int from 0 to 65535, got the string 'http'",
        "c.yaml:3:9: server.host: expected a host name or address, got a list",
        "c.yaml:4:8: saga.max_concurent: unknown key; did you mean max_concurrent?",
        "c.yaml:6:28: services.payment.port: expected int from 1 to 65535, got 99999",
        "c.yaml:7:13: services.shipping: expected a map, got 50063",
        "c.yaml:8:11: database.user: is required",
        "SAGA__SAGA__LEASE_SECS: saga.lease_secs: expected number from 1 to 3600, got the value of "
        "SAGA__SAGA__LEASE_SECS",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: b: c", "c.yaml:1:5: not YAML: "),
        ("- a", "c.yaml:1:1: expected a map, got a list"),
        ("app: &x {}", "c.yaml:1:6: app: anchors (&) are not allowed"),
        ("server: {}\nserver: {}", "c.yaml:2:1: server: duplicate key, the first one is on line 1"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(text: str, problem: str) -> None:
    assert problems(text)[0].startswith(problem)


# --- kafka -----------------------------------------------------------------------------------------------------------


def test_kafka_has_its_defaults() -> None:
    kafka = loaded(KAFKA).kafka
    assert kafka is not None
    assert kafka.brokers == ("k:9092",)
    assert kafka.security_protocol is SecurityProtocol.PLAINTEXT
    assert kafka.sasl is None
    assert kafka.topic == "k1s0.system.saga.events.v1"


def test_kafka_reads_brokers_sasl_and_topic() -> None:
    kafka = loaded("""\
kafka:
  brokers: [a:9092, "[::1]:9093"]
  security_protocol: SASL_SSL
  sasl: {mechanism: SCRAM-SHA-512, username: me, password: secret}
  topics: {publish: [orders.v1]}
""").kafka
    assert kafka is not None
    assert kafka.sasl is not None
    assert kafka.brokers == ("a:9092", "[::1]:9093")
    assert kafka.security_protocol is SecurityProtocol.SASL_SSL
    assert (kafka.sasl.mechanism, kafka.sasl.username) == (SaslMechanism.SCRAM_SHA_512, "me")
    assert kafka.sasl.password == Secret("secret")
    assert kafka.topic == "orders.v1"


@pytest.mark.parametrize("publish", ["orders.v1", "[orders.v1]"])
def test_the_topic_is_a_name_or_a_list_of_one(publish: str) -> None:
    kafka = loaded(f"kafka: {{brokers: ['k:1'], topics: {{publish: {publish}}}}}").kafka
    assert kafka is not None
    assert kafka.topic == "orders.v1"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("brokers: [k]", "kafka.brokers[0]: expected host:port, got the string 'k'"),
        (
            "brokers: ['u:hunter2@k:9092']",
            "kafka.brokers[0]: expected host:port without credentials, which are in sasl, "
            "got a value that is not shown",
        ),
        ("brokers: ['k:0']", "kafka.brokers[0]: expected a port from 1 to 65535, got the string 'k:0'"),
        ("brokers: ['k:1', 'k:99999']", "kafka.brokers[1]: expected a port from 1 to 65535, got the string 'k:99999'"),
        (
            "brokers: ['k:1'], topics: {publish: 'a b'}",
            "kafka.topics.publish: expected a topic name, got the string 'a b'",
        ),
        ("brokers: ['k:1'], topics: {publish: [a, b]}", "kafka.topics.publish: expected one topic, got a list of 2"),
        (
            "brokers: ['k:1'], sasl: {username: u, password: p}",
            "kafka.sasl: is not used with security_protocol PLAINTEXT; expected SASL_SSL or none here",
        ),
        (
            "brokers: ['k:1'], security_protocol: SASL_SSL, sasl: {username: u}",
            "kafka.sasl.password: is required, here or in password_file",
        ),
        (
            "brokers: ['k:1'], security_protocol: SASL_SSL, sasl: {username: u, password: p, mechanism: GSSAPI}",
            "kafka.sasl.mechanism: expected PLAIN or SCRAM-SHA-256 or SCRAM-SHA-512, got the string 'GSSAPI'",
        ),
    ],
)
def test_kafka_settings_that_cannot_work_are_refused(fields: str, problem: str) -> None:
    assert [text.split(": ", 1)[1] for text in problems(f"kafka: {{{fields}}}")] == [problem]
