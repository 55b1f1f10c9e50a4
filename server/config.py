"""Reads the configuration: a YAML file, the environment, and defaults; every error at once.

Sections and keys are those of `config/config.yaml`, which explains each. In order, the later one wins: built-in
defaults, the file, `DATABASE_URL` and `OTEL_EXPORTER_OTLP_ENDPOINT`, `SAGA__SECTION__KEY`. Relative paths in it are
relative to the current directory.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import msgspec

from rpc.settings import ServiceSettings, ServiceTls
from saga.admission import MAX_STARTS
from saga.door_limits import DoorLimits
from saga.yaml_fields import MapReader, read_string
from saga.yaml_nodes import (
    Fault,
    Faults,
    Fields,
    Items,
    Kind,
    Mark,
    Node,
    Refused,
    Scalar,
    cut,
    describe,
    describe_kind,
    join,
    kind_of,
    read_nodes,
)

DEFAULT_PATH = Path("config/config.yaml")
EVENTS_TOPIC = "k1s0.system.saga.events.v1"
OVERRIDE_PREFIX = "SAGA__"
OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own name for the collector's address."""
DAY_SECS = 86400.0
MAX_FILE_BYTES = 1024 * 1024


class ConfigInvalid(Exception):
    """The configuration cannot be used. `problems`: one line for each fault, in the order of the file; the text has
    them all. Values that are secret, or that came from the environment, are never in it."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Secret:
    """Text that must not be shown: `reveal` gives it, printing does not."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a secret is not to be pickled or copied elsewhere")


# --- the sections ----------------------------------------------------------------------------------------------------


class Codec(enum.StrEnum):
    """What a participant's messages are made of."""

    PROTOBUF = "protobuf"
    JSON = "json"


class AppConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What this installation is called."""

    name: str = "saga"
    environment: str = "development"


class ClientAuth(enum.StrEnum):
    """Whether a client has to show a certificate. OPTIONAL: one that is shown has to be good."""

    REQUIRED = "required"
    OPTIONAL = "optional"


class ServerTls(msgspec.Struct, frozen=True, kw_only=True):
    """TLS on both of our ports; paths of PEM files. `client_ca_file` None: clients are not asked for certificates."""

    cert_file: str
    key_file: str
    client_ca_file: str | None = None
    client_auth: ClientAuth = ClientAuth.REQUIRED


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is taken on at a time: connections and requests, of each port, and sagas being started, of both."""

    max_connections: int = DoorLimits().max_connections
    max_requests: int = DoorLimits().max_requests
    max_starts: int = MAX_STARTS


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where REST and gRPC listen. Port 0: any that is free. `tls` None: without encryption."""

    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 50051
    limits: LimitsConfig = LimitsConfig()
    tls: ServerTls | None = None

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach it."""
        return _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class SslMode(enum.StrEnum):
    """How much of TLS a connection to Postgres insists on, as libpq has it."""

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """PostgreSQL. Three of `max_open_conns` write, one listens, the others read. `max_idle_conns` of the readers are
    opened at the start; a reader that has been idle for `conn_max_lifetime` seconds is closed, 0: never.
    `ssl_root_cert`, `ssl_cert` and `ssl_key` are paths of PEM files: the authorities the server's certificate is held
    against, and what we show the server."""

    name: str
    user: str
    host: str = "localhost"
    port: int = 5432
    password: Secret | None = None
    ssl_mode: SslMode = SslMode.PREFER
    ssl_root_cert: str | None = None
    ssl_cert: str | None = None
    ssl_key: str | None = None
    max_open_conns: int = 10
    max_idle_conns: int = 5
    conn_max_lifetime: float = 300.0

    def dsn(self) -> str:
        """The connection URL for asyncpg. Holds the password: not to be logged."""
        login = quote(self.user, safe="")
        if self.password is not None:
            login += f":{quote(self.password.reveal(), safe='')}"
        query = {"sslmode": self.ssl_mode.value}
        files = {"sslrootcert": self.ssl_root_cert, "sslcert": self.ssl_cert, "sslkey": self.ssl_key}
        query |= {name: file for name, file in files.items() if file is not None}
        if self.host.startswith("/"):
            # A directory of Unix sockets does not fit into a URL's host.
            place, query["host"], query["port"] = "", self.host, str(self.port)
        else:
            place = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return f"postgresql://{login}@{place}/{quote(self.name, safe='')}?{urlencode(query)}"


class SecurityProtocol(enum.StrEnum):
    PLAINTEXT = "PLAINTEXT"
    SSL = "SSL"
    SASL_PLAINTEXT = "SASL_PLAINTEXT"
    SASL_SSL = "SASL_SSL"

    @property
    def has_sasl(self) -> bool:
        return self.value.startswith("SASL_")

    @property
    def has_tls(self) -> bool:
        return self.value.endswith("SSL")


class SaslMechanism(enum.StrEnum):
    PLAIN = "PLAIN"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_512 = "SCRAM-SHA-512"


class SaslConfig(msgspec.Struct, frozen=True, kw_only=True):
    username: str
    password: Secret
    mechanism: SaslMechanism = SaslMechanism.PLAIN


class KafkaTls(msgspec.Struct, frozen=True, kw_only=True):
    """TLS towards the brokers; paths of PEM files. `ca_file` None: the system's roots. `cert_file` and `key_file`
    together: mTLS."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class KafkaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where events go. `topic` is `topics.publish`; failed compensations also go to `<topic>.dlq`. `tls` says more
    about a `security_protocol` with SSL in it."""

    brokers: tuple[str, ...]
    security_protocol: SecurityProtocol = SecurityProtocol.PLAINTEXT
    tls: KafkaTls = KafkaTls()
    sasl: SaslConfig | None = None
    topic: str = EVENTS_TOPIC


class SagaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The engine. `data_dir` holds the embedded store's file; `:memory:`: nothing is kept. `retention_days` 0: what has
    ended is kept for ever; `audit_retention_days` 0: so is the audit log."""

    max_concurrent: int = 100
    workflow_dir: Path = Path("workflows")
    data_dir: Path = Path("data")
    lease_secs: float = 15.0
    park_after_secs: float = 30.0
    max_payload_bytes: int = 1048576
    shutdown_grace_secs: float = 30.0
    retention_days: float = 30.0
    audit_retention_days: float = 0.0

    @property
    def in_memory(self) -> bool:
        return str(self.data_dir) == ":memory:"

    @property
    def database_file(self) -> Path:
        """The embedded store's file."""
        return self.data_dir / "saga.sqlite3"


class AuthConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Who may call: bearer tokens of this issuer, for this audience, signed by a key of its key set."""

    jwks_url: str
    issuer: str
    audience: str
    jwks_cache_ttl_secs: float = 600.0

    @property
    def is_key_source_safe(self) -> bool:
        """Nobody on the way can put keys of their own among the issuer's."""
        url = urlsplit(self.jwks_url)
        return url.scheme.lower() == "https" or _is_loopback(url.hostname or "")


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(enum.StrEnum):
    """What a log line is. AUTO: text on a terminal, JSON elsewhere."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"


class LogConfig(msgspec.Struct, frozen=True, kw_only=True):
    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.AUTO


class OtlpConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where spans go: a collector that takes OTLP over HTTP, at `endpoint` + `/v1/traces`."""

    endpoint: str


class ObservabilityConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`otlp` None: no spans are kept. `redact`: fields of payloads that logs, events and pages do not show, as
    `saga.payload_mask` reads them."""

    log: LogConfig = LogConfig()
    otlp: OtlpConfig | None = None
    redact: tuple[str, ...] = ()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator can say. `database` None: the embedded store. `kafka` None: no events. `auth` None: no
    tokens are asked for. `source`: the file it was read from."""

    app: AppConfig = AppConfig()
    server: ServerConfig = ServerConfig()
    database: DatabaseConfig | None = None
    kafka: KafkaConfig | None = None
    services: dict[str, ServiceSettings] = {}
    saga: SagaConfig = SagaConfig()
    auth: AuthConfig | None = None
    observability: ObservabilityConfig = ObservabilityConfig()
    source: Path | None = None

    def refuse_open_access(self) -> None:
        """Raises `ConfigInvalid` when others than this machine could call without a token (spec section 9)."""
        if self.auth is None and not self.server.is_loopback:
            raise ConfigInvalid(
                (
                    f"server.host: expected a loopback address, got {self.server.host!r}: without an `auth` section "
                    "anyone could start and cancel sagas; add one, or say --insecure",
                )
            )


# --- loading ---------------------------------------------------------------------------------------------------------


def load_config(path: Path | None, environ: Mapping[str, str]) -> Config:
    """The configuration; `ConfigInvalid` with every error at once.

    The file is `path` (`--config`), else the one `CONFIG_PATH` names, else `config/config.yaml` if there is one; with
    none of them the built-in defaults hold. `environ` is where `${VAR}`, `SAGA__...` and `DATABASE_URL` are looked up.
    """
    source = config_file(path, environ)
    faults = Faults()
    root: Node | None = Fields({}, Mark(line=None, column=None))
    if source is not None:
        root = read_nodes(_read(source), faults, max_bytes=MAX_FILE_BYTES)
        only_comments = [fault.reason for fault in faults.in_order()] == ["empty"]
        if only_comments:
            faults, root = Faults(), Fields({}, Mark(line=1, column=1))
    config = None
    if root is not None:
        root = _overlay(_expand(root, "", environ, faults), environ, faults)
        config = _config(root, source, faults)
    if faults or config is None:
        raise ConfigInvalid(tuple(_line(source, fault) for fault in faults.in_order()))
    return config


def config_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file `load_config` reads; None: there is none."""
    if path is not None:
        return path
    if environ.get("CONFIG_PATH"):
        return Path(environ["CONFIG_PATH"])
    return DEFAULT_PATH if DEFAULT_PATH.exists() else None


def _read(source: Path) -> bytes:
    try:
        with source.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigInvalid((f"{source}: cannot be read: {error.strerror or error}",)) from error


def _line(source: Path | None, fault: Fault) -> str:
    if fault.origin is not None:
        place = f"{fault.origin}: "
    elif source is not None:
        place = f"{source}:{fault.line}:{fault.column}: " if fault.line is not None else f"{source}: "
    else:
        place = ""
    return f"{place}{fault.path}: {fault.message}" if fault.path else f"{place}{fault.message}"


# --- the environment -------------------------------------------------------------------------------------------------

_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-[^}]*)?\}|\$\{")


def _expand(node: Node, path: str, environ: Mapping[str, str], faults: Faults) -> Node:
    """The tree with variables put into its strings; `$${` stands for `${`.

    A value with a variable in it has the type its text has then, whether it stands in quotes or not: within braces YAML
    wants the quotes.
    """
    if isinstance(node, Fields):
        for key, (mark, value) in node.fields.items():
            node.fields[key] = (mark, _expand(value, join(path, key), environ, faults))
    elif isinstance(node, Items):
        node.items = [_expand(value, f"{path}[{index}]", environ, faults) for index, value in enumerate(node.items)]
    elif isinstance(node, Scalar) and "${" in node.text:
        found = [_variable(match, environ) for match in _VARIABLE.finditer(node.text)]
        missing = [one for one in found if isinstance(one, _NoValue)]
        for one in missing:
            faults.note(path, one.reason, one.message, node)
        if missing:
            return Refused(node.mark)
        following = iter(found)
        text = _VARIABLE.sub(lambda _: str(next(following)), node.text)
        return Scalar(text=text, plain=True, mark=node.mark, source=node.text)
    return node


class _NoValue(msgspec.Struct, frozen=True):
    reason: str
    message: str


def _variable(match: re.Match[str], environ: Mapping[str, str]) -> str | _NoValue:
    if match[0] == "$${":
        return "${"
    name, default = match["name"], match["default"]
    if name is None:
        return _NoValue("value", "expected ${NAME} or ${NAME:-default} ($${ stands for a plain ${)")
    value = environ.get(name)
    if default is not None and not value:
        return str(default).removeprefix(":-")
    if value is None:
        return _NoValue("missing", f"environment variable {name} is not set, and ${{{name}}} gives no default")
    return value


def _overlay(root: Node, environ: Mapping[str, str], faults: Faults) -> Node:
    """The tree with `DATABASE_URL` and `OTEL_EXPORTER_OTLP_ENDPOINT` and then the overrides put over it."""
    if not isinstance(root, Fields):
        return root
    if environ.get("DATABASE_URL"):
        for key, text in _database_url(environ["DATABASE_URL"], faults):
            _put(root, ["database", key], text, "DATABASE_URL", faults)
    if environ.get(OTLP_VARIABLE):
        _put(root, ["observability", "otlp", "endpoint"], environ[OTLP_VARIABLE], OTLP_VARIABLE, faults)
    for name in sorted(environ):
        if name.startswith(OVERRIDE_PREFIX):
            keys = name.removeprefix(OVERRIDE_PREFIX).lower().split("__")
            if all(keys):
                _put(root, keys, environ[name], name, faults)
            else:
                mark = Mark(line=None, column=None, origin=name)
                faults.note("", "unknown_key", f"expected {OVERRIDE_PREFIX}SECTION__KEY", mark)
    return root


def _put(root: Fields, keys: list[str], text: str, origin: str, faults: Faults) -> None:
    """Sets one key, making the maps on the way. Whether there is such a key is seen when the tree is read."""
    mark = Mark(line=None, column=None, origin=origin)
    here, path = root, ""
    for word in keys[:-1]:
        key = _spelling(word, here)
        path = join(path, key)
        below = here.fields[key][1] if key in here.fields else None
        if below is None or (isinstance(below, Scalar) and kind_of(below) is Kind.NULL):
            below = Fields({}, mark)
            here.fields[key] = (mark, below)
        if isinstance(below, Refused):
            return
        if not isinstance(below, Fields):
            faults.note(path, "type", f"expected a map to set {keys[-1]} in", mark)
            return
        here = below
    key = _spelling(keys[-1], here)
    present = here.fields.get(key)
    if present is not None and isinstance(present[1], Fields):
        faults.note(join(path, key), "type", "is a section; an override sets one of its keys", mark)
        return
    here.fields[key] = (mark, Scalar(text=text, plain=True, mark=mark, source=f"the value of {origin}"))
    if key in ("password", "password_file"):
        # Both at once is a fault in a file; from outside, the one that is given replaces the other.
        here.fields.pop("password_file" if key == "password" else "password", None)


def _spelling(word: str, fields: Fields) -> str:
    """The key as the file spells it: variables have no lower case and no dashes (`services.stock-api`)."""
    for key in fields.fields:
        if key.lower().replace("-", "_") == word.replace("-", "_"):
            return key
    return word


def _database_url(url: str, faults: Faults) -> Iterator[tuple[str, str]]:
    """The keys of `database` that a URL sets. Its text is never shown: there may be a password in it."""

    def refuse(message: str) -> None:
        faults.note("database", "value", message, Mark(line=None, column=None, origin="DATABASE_URL"))

    try:
        parts = urlsplit(url)
        port = parts.port
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        refuse("expected postgresql://user:password@host:port/name?sslmode=..., got something else")
        return
    if parts.scheme not in ("postgres", "postgresql"):
        refuse("expected a URL that begins with postgresql:// or postgres://")
        return
    allowed = ("sslmode", "sslrootcert", "sslcert", "sslkey", "host", "port", "user", "password", "dbname")
    if unknown := sorted(set(query) - set(allowed)):
        refuse(f"unknown parameter {cut(unknown[0], 40)}; known: {', '.join(allowed)}")
    found = {
        "host": query.get("host") or unquote(parts.hostname or ""),
        "port": query.get("port") or ("" if port is None else str(port)),
        "name": query.get("dbname") or unquote(parts.path.removeprefix("/")),
        "user": query.get("user") or unquote(parts.username or ""),
        "password": query.get("password") or unquote(parts.password or ""),
        "ssl_mode": query.get("sslmode", ""),
        "ssl_root_cert": query.get("sslrootcert", ""),
        "ssl_cert": query.get("sslcert", ""),
        "ssl_key": query.get("sslkey", ""),
    }
    yield from ((key, text) for key, text in found.items() if text)


# --- reading the sections --------------------------------------------------------------------------------------------

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


def _config(root: Node, source: Path | None, faults: Faults) -> Config:
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
        got = "an empty one" if isinstance(node, Items) else describe(node)
        fields.refuse("brokers", "type", f"expected a list of 1 or more host:port, got {got}")
        return ()
    path = fields.path_of("brokers")
    return tuple(_broker(item, f"{path}[{index}]", fields.faults) for index, item in enumerate(node.items))


def _list_in_variable(node: Scalar) -> Items:
    """A variable cannot hold a list: a,b is one."""
    parts = [part.strip() for part in node.text.split(",")]
    return Items([Scalar(part, plain=False, mark=node.mark, source=node.source) for part in parts], node.mark)


def _broker(node: Node, path: str, faults: Faults) -> str:
    text = read_string(node, path, faults, matching=_BROKER, expected="host:port")
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
