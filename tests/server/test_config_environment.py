"""Variables in the file, overrides from outside, and the database's URL."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.config import Config, ConfigInvalid, DatabaseConfig, LogLevel, Secret, SslMode
from server.config_loading import load_config
from tests.server.config_files import loaded, problems
from tests.support.postgres import in_plain_loop

pytestmark = pytest.mark.usefixtures("empty_folder")


def database_of(config: Config) -> DatabaseConfig:
    assert config.database is not None
    return config.database


# --- ${VAR} ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "environ", "name"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("${A:-d}", {"A": "x"}, "x"),
        ("${A:-d}", {}, "d"),
        ("${A:-d}", {"A": ""}, "d"),
        ("pre-${A}-${B:-b}-post", {"A": "x"}, "pre-x-b-post"),
        ("'${A}'", {"A": "yes"}, "yes"),
        ("${A}", {"A": "yes"}, "yes"),
        ("${A}", {"A": "12345"}, "12345"),
        ("${A}", {"A": "null"}, "null"),
        ("${A}", {"A": "a: b # [c"}, "a: b # [c"),
        ("${A}", {"A": "${B}"}, "${B}"),
        ("$${A}", {"A": "x"}, "${A}"),
        ("cost-$5", {}, "cost-$5"),
        ("${A:-a:-b}", {}, "a:-b"),
    ],
)
def test_variables_expand_inside_strings(written: str, environ: dict[str, str], name: str) -> None:
    assert loaded(f"app:\n  name: {written}\n", **environ).app.name == name


def test_a_value_has_the_type_it_has_after_expansion() -> None:
    text = "server: {port: '${P}'}\nsaga:\n  lease_secs: ${L:-2.5}\n  max_concurrent: 1${N:-0}\n"
    config = loaded(text, P="9090")
    assert (config.server.port, config.saga.lease_secs, config.saga.max_concurrent) == (9090, 2.5, 10)
    assert problems(text, P="http", L="null") == [
        "c.yaml:1:16: server.port: expected int from 0 to 65535, got ${P}",
        "c.yaml:3:15: saga.lease_secs: expected number from 1 to 3600, got ${L:-2.5}",
    ]


def test_a_variable_that_is_not_set_and_has_no_default_stops_the_start() -> None:
    assert problems("database:\n  name: ${DB}\n  user: u\n  host: ${HOST}-${DOMAIN}\n") == [
        "c.yaml:2:9: database.name: environment variable DB is not set, and ${DB} gives no default",
        "c.yaml:4:9: database.host: environment variable HOST is not set, and ${HOST} gives no default",
        "c.yaml:4:9: database.host: environment variable DOMAIN is not set, and ${DOMAIN} gives no default",
    ]


@pytest.mark.parametrize("written", ["${", "${}", "${1A}", "${A", "${A-b}", "${A:=b}", "${ A }"])
def test_a_variable_of_another_form_is_refused(written: str) -> None:
    found = problems(f"app: {{name: 'x{written}'}}", A="a")
    assert found == ["c.yaml:1:13: app.name: expected ${NAME} or ${NAME:-default} ($${ stands for a plain ${)"]


def test_an_empty_variable_leaves_an_optional_key_unset() -> None:
    config = loaded("database: {name: a, user: b, password: '${P:-}'}")
    assert database_of(config).password is None


def test_variables_expand_in_lists() -> None:
    kafka = loaded("kafka: {brokers: ['${K}:9092', 'b:1']}", K="a").kafka
    assert kafka is not None
    assert kafka.brokers == ("a:9092", "b:1")
    kafka = loaded("kafka: {brokers: '${K}'}", K="a:1, b:2").kafka
    assert kafka is not None
    assert kafka.brokers == ("a:1", "b:2")


# --- SAGA__SECTION__KEY ----------------------------------------------------------------------------------------------

FILE = """\
server: {port: 1}
services:
  payment: {host: h, port: 1}
  stock-api: {host: h, port: 2}
"""


def test_an_override_sets_a_key_over_the_file_or_besides_it() -> None:
    config = loaded(
        FILE,
        SAGA__SERVER__PORT="9090",
        SAGA__SAGA__LEASE_SECS="2.5",
        SAGA__OBSERVABILITY__LOG__LEVEL="debug",
        SAGA__APP__NAME="12",
        SAGA__SERVICES__PAYMENT__HOST="other",
        SAGA__SERVICES__STOCK_API__TLS="true",
        OTHER__SERVER__PORT="7",
        SAGA_SERVER_PORT="8",
    )
    assert config.server.port == 9090
    assert config.saga.lease_secs == 2.5
    assert config.observability.log.level is LogLevel.DEBUG
    assert config.app.name == "12"
    assert config.services["payment"].host == "other"
    assert config.services["stock-api"].tls is not None
    assert set(config.services) == {"payment", "stock-api"}


def test_overrides_work_without_a_file_and_make_sections_and_services() -> None:
    environ = {
        "SAGA__DATABASE__NAME": "orders",
        "SAGA__DATABASE__USER": "me",
        "SAGA__DATABASE__PASSWORD": "\"# ${x}: ['",
        "SAGA__KAFKA__BROKERS": "a:1,b:2",
        "SAGA__SERVICES__PAYMENT__HOST": "h",
        "SAGA__SERVICES__PAYMENT__PORT": "5",
    }
    config = load_config(None, environ)
    assert database_of(config).name == "orders"
    assert database_of(config).password == Secret("\"# ${x}: ['")
    assert config.kafka is not None
    assert config.kafka.brokers == ("a:1", "b:2")
    assert config.services["payment"].port == 5


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("SAGA__SERVER__PROT", "1", "server.prot: unknown key; did you mean port?"),
        ("SAGA__SEVER__PORT", "1", "sever: unknown key; did you mean server?"),
        ("SAGA__X", "1", "x: unknown key; known: app, auth, database, kafka, observability, saga, server, services"),
        (
            "SAGA__SERVER__PORT",
            "many",
            "server.port: expected int from 0 to 65535, got the value of SAGA__SERVER__PORT",
        ),
        ("SAGA__SERVER__PORT__X", "1", "server.port: expected a map to set x in"),
        ("SAGA__SERVER", "1", "server: is a section; an override sets one of its keys"),
        ("SAGA__AUTH", "", "auth: expected a map, got the value of SAGA__AUTH; leave the key out to do without"),
        ("SAGA__SERVICES__PAYMENT__HSOT", "1", "services.payment.hsot: unknown key; did you mean host?"),
        ("SAGA__SERVICES__PAYMNT__HOST", "x", "services.paymnt.port: is required"),
        ("SAGA__", "1", "expected SAGA__SECTION__KEY"),
        ("SAGA__SERVER____PORT", "1", "expected SAGA__SECTION__KEY"),
    ],
)
def test_an_override_of_an_unknown_key_or_of_a_wrong_type_is_refused(name: str, value: str, problem: str) -> None:
    assert problems(FILE, **{name: value}) == [f"{name}: {problem}"]


def test_a_password_from_outside_replaces_the_file_that_was_named() -> None:
    text = "database: {name: a, user: b, password_file: none}"
    assert database_of(loaded(text, SAGA__DATABASE__PASSWORD="x")).password == Secret("x")
    assert database_of(loaded(text, DATABASE_URL="postgres://u:y@h/d")).password == Secret("y")
    Path("secret").write_text("z\n")
    text = "database: {name: a, user: b, password: x}"
    assert database_of(loaded(text, SAGA__DATABASE__PASSWORD_FILE="secret")).password == Secret("z")


# --- infrastructure/database: the URL --------------------------------------------------------------------------------


FILES = "sslrootcert=ca.pem&sslcert=c.pem&sslkey=k.pem"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_the_database_url_makes_the_section(scheme: str) -> None:
    config = load_config(
        None, {"DATABASE_URL": f"{scheme}://u%40x:p%2F%3A%25@db.example.com:6543/my%20db?sslmode=verify-ca&{FILES}"}
    )
    assert database_of(config) == DatabaseConfig(
        host="db.example.com",
        port=6543,
        name="my db",
        user="u@x",
        password=Secret("p/:%"),
        ssl_mode=SslMode.VERIFY_CA,
        ssl_root_cert="ca.pem",
        ssl_cert="c.pem",
        ssl_key="k.pem",
    )
    assert config.database is not None
    assert config.database.dsn().endswith(f"/my%20db?sslmode=verify-ca&{FILES}")


def test_the_database_url_goes_over_the_file_and_an_override_over_the_url() -> None:
    config = loaded(
        "database: {host: h, port: 1, name: n, user: u, password: p, max_open_conns: 7}",
        DATABASE_URL="postgres://other@db/orders",
        SAGA__DATABASE__PORT="9",
    )
    database = database_of(config)
    assert (database.host, database.name, database.user, database.port) == ("db", "orders", "other", 9)
    assert (database.password, database.max_open_conns) == (Secret("p"), 7)


def test_an_empty_database_url_is_as_none() -> None:
    assert load_config(None, {"DATABASE_URL": ""}).database is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("mysql://u:hunter2@h/d", "expected a URL that begins with postgresql:// or postgres://"),
        ("hunter2", "expected a URL that begins with postgresql:// or postgres://"),
        (
            "postgres://u:hunter2@h:port/d",
            "expected postgresql://user:password@host:port/name?sslmode=..., got something",
        ),
        (
            "postgres://u:hunter2@h:99999/d",
            "expected postgresql://user:password@host:port/name?sslmode=..., got something",
        ),
        ("postgres://u:hunter2@[h/d", "expected postgresql://user:password@host:port/name?sslmode=..., got something"),
        (
            "postgres://u:hunter2@h/d?sslmode",
            "expected postgresql://user:password@host:port/name?sslmode=..., got some",
        ),
        (
            "postgres://u:hunter2@h/d?ssl=1",
            "unknown parameter ssl; known: sslmode, sslrootcert, sslcert, sslkey, host, ",
        ),
        ("postgres://u:hunter2@h/d?sslkey=k.pem", "expected ssl_cert and ssl_key together"),
        (
            "postgres://u:hunter2@h/d?sslmode=yes",
            "expected disable or allow or prefer or require or verify-ca or verify",
        ),
        ("postgres://u:hunter2@h", "is required"),
        ("postgres://h/d", "is required"),
        (
            "postgres://u:hunter2@h%20x/d",
            "expected a host name, an address or a directory of sockets, got a value that",
        ),
    ],
)
def test_a_bad_database_url_is_refused_without_being_shown(url: str, problem: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_config(None, {"DATABASE_URL": url})
    (found,) = caught.value.problems
    assert found.startswith("DATABASE_URL: database")
    assert f": {problem}" in found
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("database", "dsn"),
    [
        (DatabaseConfig(name="n", user="u"), "postgresql://u@localhost:5432/n?sslmode=prefer"),
        (
            DatabaseConfig(name="a/b", user="u@x", password=Secret("p:/?#%@ é"), ssl_mode=SslMode.VERIFY_FULL),
            "postgresql://u%40x:p%3A%2F%3F%23%25%40%20%C3%A9@localhost:5432/a%2Fb?sslmode=verify-full",
        ),
        (DatabaseConfig(name="n", user="u", host="::1"), "postgresql://u@[::1]:5432/n?sslmode=prefer"),
        (
            DatabaseConfig(name="n", user="u", host="/run/pg", port=6),
            "postgresql://u@/n?sslmode=prefer&host=%2Frun%2Fpg&port=6",
        ),
    ],
)
def test_the_dsn_escapes_what_a_url_cannot_hold(database: DatabaseConfig, dsn: str) -> None:
    assert database.dsn() == dsn


@settings(deadline=None)
@given(*[st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)] * 3)
def test_a_dsn_read_back_as_database_url_is_the_same_database(name: str, user: str, password: str) -> None:
    database = DatabaseConfig(name=name, user=user, password=Secret(password))
    assert load_config(None, {"DATABASE_URL": database.dsn()}).database == database


def test_asyncpg_logs_in_with_what_the_configuration_says() -> None:
    """Against a server that asks for the password in clear text and hangs up: what asyncpg sent is what counts."""
    database = DatabaseConfig(
        name="my/d b?", user="u@x:y", password=Secret("p:/?#%@ +é"), ssl_mode=SslMode.DISABLE, host="127.0.0.1"
    )

    async def login() -> tuple[bytes, bytes]:
        sent: asyncio.Future[tuple[bytes, bytes]] = asyncio.get_running_loop().create_future()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            startup = await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
            writer.write(b"R" + (8).to_bytes(4) + (3).to_bytes(4))
            await reader.readexactly(1)
            password = await reader.readexactly(int.from_bytes(await reader.readexactly(4)) - 4)
            sent.set_result((startup, password))
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        dsn = database.dsn().replace(":5432", f":{port}")
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await asyncpg.connect(dsn, timeout=10)
        server.close()
        return await sent

    startup, password = in_plain_loop(login)
    fields = startup[4:].split(b"\0")
    pairs: dict[Any, Any] = dict(zip(fields[::2], fields[1::2], strict=False))
    assert pairs[b"user"].decode() == database.user
    assert pairs[b"database"].decode() == database.name
    assert database.password is not None
    assert password == database.password.reveal().encode() + b"\0"


def test_a_password_is_quoted_in_the_url_as_urllib_quotes_it() -> None:
    text = "".join(map(chr, range(33, 127)))
    assert quote(text, safe="") in DatabaseConfig(name="n", user="u", password=Secret(text)).dsn()


def test_opentelemetrys_own_variable_names_the_collector_and_an_override_goes_before_it() -> None:
    text = "observability: {otlp: {endpoint: 'http://file:1'}}"
    found = [
        loaded(text).observability.otlp,
        loaded(text, OTEL_EXPORTER_OTLP_ENDPOINT="http://variable:2").observability.otlp,
        load_config(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://variable:2"}).observability.otlp,
        loaded(
            text,
            OTEL_EXPORTER_OTLP_ENDPOINT="http://variable:2",
            SAGA__OBSERVABILITY__OTLP__ENDPOINT="http://override:3",
        ).observability.otlp,
        load_config(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}).observability.otlp,
    ]
    told = [None if otlp is None else otlp.endpoint.rpartition(":")[2] for otlp in found]
    assert told == ["1", "2", "2", "3", None]


def test_an_address_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(ConfigInvalid) as refused:
        load_config(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "u:s3cret@collector:4318"})
    assert "OTEL_EXPORTER_OTLP_ENDPOINT: observability.otlp.endpoint: expected an http(s) URL" in str(refused.value)
    assert "s3cret" not in str(refused.value)
