"""The nodes of the configuration as its types: each key, and what has to hold between keys. Notes every fault and goes
on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rpc.settings import ServiceSettings, ServiceTls
from saga.yaml_fields import MapReader, read_string
from saga.yaml_nodes import Faults, Fields, Items, Kind, Node, Scalar, describe, describe_kind, kind_of
from server.config import (
    EVENTS_TOPIC,
    AppConfig,
    AuthConfig,
    ClientAuth,
    Codec,
    Config,
    DatabaseConfig,
    KafkaConfig,
    KafkaTls,
    LimitsConfig,
    LogConfig,
    LogFormat,
    LogLevel,
    ObservabilityConfig,
    OtlpConfig,
    SagaConfig,
    SaslConfig,
    SaslMechanism,
    Secret,
    SecurityProtocol,
    ServerConfig,
    ServerTls,
    SslMode,
)

DAY_SECS = 86400.0

_T = TypeVar("_T")
_HOST = re.compile(r"[^\s/@?#\[\]]+")
_HOST_OR_SOCKETS = re.compile(r"/.*|[^\s/@?#\[\]]+")
_BROKER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/@?#\[\]:]+):(?P<port>[0-9]{1,5})")
_FIELD_PATH = re.compile(r"[^.\s]+(?:\.[^.\s]+)*")
_TOPIC = re.compile(r"[A-Za-z0-9._-]+")
_SERVICE_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,255}")
_OTLP_URL = re.compile(r"https?://[^\s/?#]+[^\s?#]*")
_HTTP_URL = re.compile(r"https?://[^\s/?#]+[^\s#]*")
_DURATION = re.compile(r"(?P<count>[0-9]{1,9}(\.[0-9]{1,9})?)(?P<unit>ms|s|m|h|d)")
_UNIT_SECS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY_SECS}


def read_config(root: Node, source: Path | None, faults: Faults) -> Config:
    """The configuration in `root`, of the file `source`; of use when nothing was added to `faults`."""
    fields = MapReader(root, "", faults)
    config = Config(
        app=_section(fields, "app", _app) or AppConfig(),
        server=_section(fields, "server", _server) or ServerConfig(),
        database=_switch(fields, "database", _database),
        kafka=_switch(fields, "kafka", _kafka),
        services=_section(fields, "services", _services) or {},
        saga=_section(fields, "saga", _saga) or SagaConfig(),
        auth=_switch(fields, "auth", _auth),
        observability=_section(fields, "observability", _observability) or ObservabilityConfig(),
        source=source,
    )
    fields.close()
    return config


def _section(fields: MapReader, key: str, read: Callable[[MapReader], _T]) -> _T | None:
    section = fields.section(key)
    if section is None:
        return None
    result = read(section)
    section.close()
    return result


def _switch(fields: MapReader, key: str, read: Callable[[MapReader], _T]) -> _T | None:
    """A section whose presence switches something on. Unlike elsewhere null is a fault: `auth:` with everything below
    it commented out must not open the server."""
    node = fields.take(key, null_is_absent=False)
    if node is None:
        return None
    if not isinstance(node, Fields):
        fields.refuse(key, "type", f"expected a map, got {describe_kind(node)}; leave the key out to do without")
        return None
    return _section(fields, key, read)


def _app(fields: MapReader) -> AppConfig:
    default = AppConfig()
    return AppConfig(
        name=fields.string("name", default.name), environment=fields.string("environment", default.environment)
    )


def _server(fields: MapReader) -> ServerConfig:
    default = ServerConfig()
    server = ServerConfig(
        host=fields.string("host", default.host, matching=_HOST, expected="a host name or address"),
        port=fields.integer("port", default.port, low=0, high=65535),
        grpc_port=fields.integer("grpc_port", default.grpc_port, low=0, high=65535),
        limits=_section(fields, "limits", _limits) or default.limits,
        tls=_switch(fields, "tls", _server_tls),
    )
    if server.port == server.grpc_port != 0:
        fields.refuse("grpc_port", "value", f"expected another port than server.port, got {server.port} for both")
    return server


def _limits(fields: MapReader) -> LimitsConfig:
    default = LimitsConfig()
    return LimitsConfig(
        max_connections=fields.integer("max_connections", default.max_connections, low=1, high=100_000),
        max_requests=fields.integer("max_requests", default.max_requests, low=1, high=1_000_000),
        max_starts=fields.integer("max_starts", default.max_starts, low=1, high=1_000_000),
    )


def _server_tls(fields: MapReader) -> ServerTls:
    tls = ServerTls(
        cert_file=fields.string("cert_file", max_chars=4096),
        key_file=fields.string("key_file", max_chars=4096),
        client_ca_file=fields.optional_string("client_ca_file", max_chars=4096),
        client_auth=fields.choice("client_auth", ClientAuth, ClientAuth.REQUIRED),
    )
    if tls.client_ca_file is None and "client_auth" in fields.names():
        fields.refuse("client_auth", "value", "expected client_ca_file with it: the authorities of the clients")
    return tls


def _database(fields: MapReader) -> DatabaseConfig:
    name, user = fields.string("name", max_chars=63), fields.string("user", max_chars=63)
    max_open_conns = fields.integer("max_open_conns", 10, low=5, high=10_000)
    max_idle_conns = fields.integer("max_idle_conns", min(5, max_open_conns), low=0, high=10_000)
    if max_idle_conns > max_open_conns:
        wanted = f"expected at most max_open_conns ({max_open_conns})"
        fields.refuse("max_idle_conns", "range", f"{wanted}, got {max_idle_conns}")
    ssl_cert, ssl_key = _pair(fields, "ssl_cert", "ssl_key")
    return DatabaseConfig(
        name=name,
        user=user,
        host=fields.string(
            "host",
            "localhost",
            matching=_HOST_OR_SOCKETS,
            expected="a host name, an address or a directory of sockets",
            secret=True,
        ),
        port=fields.integer("port", 5432, low=1, high=65535),
        password=_password(fields),
        ssl_mode=fields.choice("ssl_mode", SslMode, SslMode.PREFER),
        ssl_root_cert=fields.optional_string("ssl_root_cert", max_chars=4096),
        ssl_cert=ssl_cert,
        ssl_key=ssl_key,
        max_open_conns=max_open_conns,
        max_idle_conns=max_idle_conns,
        conn_max_lifetime=_duration_secs(fields, "conn_max_lifetime", 300.0),
    )


def _pair(fields: MapReader, cert_key: str, key_key: str) -> tuple[str | None, str | None]:
    """The files of a certificate and of its key: both or none."""
    cert_file = fields.optional_string(cert_key, max_chars=4096)
    key_file = fields.optional_string(key_key, max_chars=4096)
    given = {cert_key, key_key} & set(fields.names())
    if len(given) == 1:
        fields.refuse(given.pop(), "value", f"expected {cert_key} and {key_key} together")
    return cert_file, key_file


def _password(fields: MapReader) -> Secret | None:
    """From `password`, or from the file `password_file` names, without its last line end."""
    password = fields.optional_string("password", max_chars=4096, secret=True)
    file = fields.optional_string("password_file", max_chars=4096)
    if password is not None and file is not None:
        fields.refuse("password_file", "value", "expected password or password_file, got both")
    if file is None:
        return None if password is None else Secret(password)
    try:
        text = Path(file).read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        fields.refuse("password_file", "value", f"cannot be read: {cause}")
        return None
    if not text:
        fields.refuse("password_file", "value", "the file is empty")
    return Secret(text)


def _duration_secs(fields: MapReader, key: str, default: float) -> float:
    node = fields.take(key)
    if node is None:
        return default
    if not isinstance(node, Scalar) or kind_of(node) is not Kind.STRING:
        return fields.number(key, low=0, high=365 * DAY_SECS)
    match = _DURATION.fullmatch(node.text)
    if match is None:
        fields.refuse(key, "value", f"expected a number of seconds or a duration as 90s, 5m, 1h, got {describe(node)}")
        return default
    secs = float(match["count"]) * _UNIT_SECS[match["unit"]]
    if secs > 365 * DAY_SECS:
        fields.refuse(key, "range", f"expected at most 365d, got {describe(node)}")
    return secs


def _kafka(fields: MapReader) -> KafkaConfig:
    protocol = fields.choice("security_protocol", SecurityProtocol, SecurityProtocol.PLAINTEXT)
    sasl = _switch(fields, "sasl", _sasl)
    if protocol.has_sasl and "sasl" not in fields.names():
        fields.refuse("sasl", "missing", f"is required with security_protocol {protocol}")
    elif not protocol.has_sasl and sasl is not None:
        fields.refuse("sasl", "value", f"is not used with security_protocol {protocol}; expected SASL_SSL or none here")
    tls = _switch(fields, "tls", _kafka_tls)
    if tls is not None and not protocol.has_tls:
        fields.refuse("tls", "value", f"is not used with security_protocol {protocol}; expected SSL or SASL_SSL")
    return KafkaConfig(
        brokers=_brokers(fields),
        security_protocol=protocol,
        tls=tls or KafkaTls(),
        sasl=sasl,
        topic=_section(fields, "topics", _publish_topic) or EVENTS_TOPIC,
    )


def _kafka_tls(fields: MapReader) -> KafkaTls:
    cert_file, key_file = _pair(fields, "cert_file", "key_file")
    ca_file = fields.optional_string("ca_file", max_chars=4096)
    return KafkaTls(ca_file=ca_file, cert_file=cert_file, key_file=key_file)


def _brokers(fields: MapReader) -> tuple[str, ...]:
    node = fields.take("brokers", required=True)
    if isinstance(node, Scalar) and node.source is not None:
        node = _list_in_variable(node)
    if node is None:
        return ()
    if not isinstance(node, Items) or not node.items:
        got = "an empty one" if isinstance(node, Items) else describe_kind(node)
        fields.refuse("brokers", "type", f"expected a list of 1 or more host:port, got {got}")
        return ()
    path = fields.path_of("brokers")
    return tuple(_broker(item, f"{path}[{index}]", fields.faults) for index, item in enumerate(node.items))


def _list_in_variable(node: Scalar) -> Items:
    """A variable cannot hold a list: a,b is one."""
    parts = [part.strip() for part in node.text.split(",")]
    return Items([Scalar(part, plain=False, mark=node.mark, source=node.source) for part in parts], node.mark)


def _broker(node: Node, path: str, faults: Faults) -> str:
    # Others take a password so; it is to be in no error, and the address is in lines of the log.
    has_login = isinstance(node, Scalar) and "@" in node.text
    expected = "host:port without credentials, which are in sasl" if has_login else "host:port"
    text = read_string(node, path, faults, matching=_BROKER, expected=expected, secret=has_login)
    match = _BROKER.fullmatch(text)
    if match is not None and not 1 <= int(match["port"]) <= 65535:
        faults.note(path, "range", f"expected a port from 1 to 65535, got {describe(node)}", node)
    return text


def _publish_topic(fields: MapReader) -> str:
    """One name, also as a list of one, as the platform's other services have it."""
    node = fields.take("publish")
    if node is None:
        return EVENTS_TOPIC
    if isinstance(node, Items):
        if len(node.items) != 1:
            fields.refuse("publish", "range", f"expected one topic, got a list of {len(node.items)}")
            return EVENTS_TOPIC
        node = node.items[0]
    # Kafka's own limit is 249; `.dlq` is appended to it.
    return read_string(
        node, fields.path_of("publish"), fields.faults, max_chars=245, matching=_TOPIC, expected="a topic name"
    )


def _sasl(fields: MapReader) -> SaslConfig:
    password = _password(fields)
    if password is None and not {"password", "password_file"} & set(fields.names()):
        fields.refuse("password", "missing", "is required, here or in password_file")
    return SaslConfig(
        username=fields.string("username"),
        password=password or Secret(""),
        mechanism=fields.choice("mechanism", SaslMechanism, SaslMechanism.PLAIN),
    )


def _services(fields: MapReader) -> dict[str, ServiceSettings]:
    services = {}
    for name in fields.names():
        if not _SERVICE_NAME.fullmatch(name):
            fields.refuse(name, "key", "expected a service name of 1 to 255 characters, no control characters")
        node = fields.take(name, null_is_absent=False)
        if node is None:
            continue
        section = MapReader(node, fields.path_of(name), fields.faults)
        services[name] = _service(section)
        section.close()
    return services


def _service(fields: MapReader) -> ServiceSettings:
    return ServiceSettings(
        host=fields.string("host", matching=_HOST, expected="a host name or address"),
        port=fields.integer("port", low=1, high=65535),
        codec=fields.choice("codec", Codec, Codec.PROTOBUF).value,
        descriptor_set=fields.optional_string("descriptor_set", max_chars=4096),
        tls=_tls(fields),
    )


def _tls(fields: MapReader) -> ServiceTls | None:
    """`tls: true`: TLS with the system's roots; a map says more."""
    node = fields.take("tls")
    if node is None:
        return None
    if isinstance(node, Scalar):
        return ServiceTls() if fields.boolean("tls", False) else None
    section = MapReader(node, fields.path_of("tls"), fields.faults)
    tls = ServiceTls(
        ca_file=section.optional_string("ca_file", max_chars=4096),
        cert_file=section.optional_string("cert_file", max_chars=4096),
        key_file=section.optional_string("key_file", max_chars=4096),
        server_name=section.optional_string("server_name", matching=_HOST, expected="a host name"),
    )
    if (tls.cert_file is None) != (tls.key_file is None):
        fields.refuse("tls", "value", "expected cert_file and key_file together")
    section.close()
    return tls


def _saga(fields: MapReader) -> SagaConfig:
    default = SagaConfig()
    return SagaConfig(
        max_concurrent=fields.integer("max_concurrent", default.max_concurrent, low=1, high=1_000_000),
        workflow_dir=Path(fields.string("workflow_dir", str(default.workflow_dir), max_chars=4096)),
        data_dir=Path(fields.string("data_dir", str(default.data_dir), max_chars=4096)),
        lease_secs=fields.number("lease_secs", default.lease_secs, low=1, high=3600),
        park_after_secs=fields.number("park_after_secs", default.park_after_secs, low=0, high=DAY_SECS),
        max_payload_bytes=fields.integer("max_payload_bytes", default.max_payload_bytes, low=2, high=64 * 1024 * 1024),
        shutdown_grace_secs=fields.number("shutdown_grace_secs", default.shutdown_grace_secs, low=0, high=3600),
        # A hundred years: the store takes them off an instant that must stay a date.
        retention_days=fields.number("retention_days", default.retention_days, low=0, high=36_500),
        audit_retention_days=fields.number("audit_retention_days", default.audit_retention_days, low=0, high=36_500),
    )


def _auth(fields: MapReader) -> AuthConfig:
    return AuthConfig(
        jwks_url=fields.string("jwks_url", max_chars=2048, matching=_HTTP_URL, expected="an http(s) URL", secret=True),
        issuer=fields.string("issuer", max_chars=2048),
        audience=fields.string("audience", max_chars=2048),
        jwks_cache_ttl_secs=fields.number("jwks_cache_ttl_secs", 600.0, low=1, high=7 * DAY_SECS),
    )


def _observability(fields: MapReader) -> ObservabilityConfig:
    return ObservabilityConfig(
        log=_section(fields, "log", _log) or LogConfig(),
        otlp=_switch(fields, "otlp", _otlp),
        redact=_redact(fields),
    )


def _redact(fields: MapReader) -> tuple[str, ...]:
    node = fields.take("redact")
    if node is None:
        return ()
    if isinstance(node, Scalar) and node.source is not None:
        node = _list_in_variable(node)
    if not isinstance(node, Items):
        fields.refuse("redact", "type", f"expected a list of names or dotted paths of fields, got {describe(node)}")
        return ()
    path = fields.path_of("redact")
    expected = "the name of a field, or a path of names with dots between them"
    return tuple(
        read_string(item, f"{path}[{index}]", fields.faults, matching=_FIELD_PATH, expected=expected)
        for index, item in enumerate(node.items)
    )


def _log(fields: MapReader) -> LogConfig:
    return LogConfig(
        level=fields.choice("level", LogLevel, LogLevel.INFO), format=fields.choice("format", LogFormat, LogFormat.AUTO)
    )


def _otlp(fields: MapReader) -> OtlpConfig:
    # There may be a password in it.
    wanted = "an http(s) URL without a query"
    return OtlpConfig(
        endpoint=fields.string("endpoint", max_chars=2048, matching=_OTLP_URL, expected=wanted, secret=True)
    )
