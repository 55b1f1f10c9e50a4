"""The configuration as values: a type for each section, with its defaults.

Sections and keys are those of `config/config.yaml`, which explains each. How they are read is not here: see
`config_loading.py`.
"""

from __future__ import annotations

import enum
import ipaddress
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from rpc.settings import ServiceSettings
from saga.admission import MAX_STARTS
from saga.door_limits import DoorLimits

EVENTS_TOPIC = "k1s0.system.saga.events.v1"


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
    def asks_for_workflows(self) -> bool:
        """Another folder than the default one is named, so it has to be there; the default one need not."""
        return self.workflow_dir != SagaConfig().workflow_dir

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
    tokens are asked for. `source`: the file it was read from. `insecure`: without `auth`, others than this machine may
    come too; said on the command line alone."""

    app: AppConfig = AppConfig()
    server: ServerConfig = ServerConfig()
    database: DatabaseConfig | None = None
    kafka: KafkaConfig | None = None
    services: dict[str, ServiceSettings] = {}
    saga: SagaConfig = SagaConfig()
    auth: AuthConfig | None = None
    observability: ObservabilityConfig = ObservabilityConfig()
    source: Path | None = None
    insecure: bool = False

    @property
    def is_for_this_machine_only(self) -> bool:
        """Anybody on it may do everything, and nobody else may come."""
        return self.auth is None and not self.insecure

    def refuse_open_access(self) -> None:
        """Raises `ConfigInvalid` when others than this machine could call without a token (spec section 9)."""
        if self.is_for_this_machine_only and not self.server.is_loopback:
            raise ConfigInvalid(
                (
                    f"server.host: expected a loopback address, got {self.server.host!r}: without an `auth` section "
                    "anyone could start and cancel sagas; add one, or say --insecure",
                )
            )
