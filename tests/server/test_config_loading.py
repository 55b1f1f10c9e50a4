"""Which file is read, and that any file is read or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpc.settings import ServiceSettings
from server.config import Config, ConfigInvalid, SagaConfig, Secret
from server.config_loading import load_config
from tests.server.config_files import loaded

pytestmark = pytest.mark.usefixtures("empty_folder")

ROOT = Path(__file__).parents[2]


# --- which file ------------------------------------------------------------------------------------------------------


def test_without_any_file_the_built_in_defaults_hold() -> None:
    assert load_config(None, {}) == Config()


def test_the_file_named_on_the_command_line_comes_before_the_variable_and_that_before_the_default() -> None:
    for name, port in (("flag.yaml", 1), ("variable.yaml", 2), ("config/config.yaml", 3)):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"server: {{port: {port}}}")
    environ = {"CONFIG_PATH": "variable.yaml"}
    assert load_config(Path("flag.yaml"), environ).server.port == 1
    assert load_config(None, environ).server.port == 2
    assert load_config(None, {"CONFIG_PATH": ""}).server.port == 3
    assert load_config(None, {}).source == Path("config/config.yaml")


def test_a_file_that_cannot_be_read_is_named() -> None:
    for path, cause in ((Path("none.yaml"), "No such file or directory"), (Path(), "Is a directory")):
        with pytest.raises(ConfigInvalid) as caught:
            load_config(path, {})
        assert str(caught.value) == f"{path}: cannot be read: {cause}"
    with pytest.raises(ConfigInvalid):
        load_config(None, {"CONFIG_PATH": "none.yaml"})


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("database: {host: ü, password: ${PW}}", 1, 32),
        ("kafka:\n  brokers: [a, ${PW:-x}]", 2, 17),
        ("database: {\n  password: ${PW},\n}", 2, 14),
    ],
)
def test_a_variable_within_braces_that_is_not_in_quotes_is_told_to_want_them(text: str, line: int, column: int) -> None:
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigInvalid) as caught:
        load_config(Path("c.yaml"), {"PW": "x"})
    told = str(caught.value)
    assert told.startswith(f"c.yaml:{line}:{column}: not YAML: ")
    assert told.endswith("; within { } and [ ] put ${...} in quotes")
    Path("c.yaml").write_text("database: {host: a b: c}")
    with pytest.raises(ConfigInvalid) as caught:
        load_config(Path("c.yaml"), {})
    assert "quotes" not in str(caught.value).replace("put a text that holds ': ' in quotes", "")


def test_the_configuration_for_development_loads_without_any_variable() -> None:
    config = load_config(ROOT / "config" / "config.dev.yaml", {})
    assert config.database is None
    assert config.server.is_loopback
    assert config.services == {
        "inventory": ServiceSettings(host="127.0.0.1", port=50061),
        "payment": ServiceSettings(host="127.0.0.1", port=50062),
        "shipping": ServiceSettings(host="127.0.0.1", port=50063),
    }
    config.refuse_open_access()


def test_the_configuration_for_production_takes_its_secrets_from_the_environment() -> None:
    config = load_config(ROOT / "config" / "config.yaml", {"DATABASE_PASSWORD": "12345", "DATABASE_PORT": "5433"})
    assert config.database is not None
    assert (config.database.password, config.database.port) == (Secret("12345"), 5433)
    assert config.saga == SagaConfig()
    assert set(config.services) == {"inventory", "payment", "shipping"}


def test_the_sections_that_are_commented_out_in_the_production_file_load_too() -> None:
    lines = (ROOT / "config" / "config.yaml").read_text().splitlines()
    opened = [line.removeprefix("# ") if line.startswith(("# kafka:", "# auth:", "#   ")) else line for line in lines]
    config = loaded("\n".join(opened), KAFKA_PASSWORD="k")
    assert config.kafka is not None
    assert config.kafka.sasl is not None
    assert config.auth is not None


# --- whatever comes --------------------------------------------------------------------------------------------------


_KEYS = "app server database kafka services saga auth observability host port name user tls brokers log level sasl"
_values = st.recursive(
    st.sampled_from(["x", "1", "null", "true", "[]", "{}", "'${A}'", "${A:-1}", "yes", "0.5", "''", "!t x"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(st.sampled_from(_KEYS.split()), inner, max_size=4).map(
            lambda fields: "{" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}"
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(_values, st.text(max_size=100).filter(lambda text: text.isprintable())),
    st.dictionaries(
        st.sampled_from(
            ["A", "DATABASE_URL", "SAGA__SERVER__PORT", "SAGA__SERVER", "SAGA__A__B__C", "SAGA__", "SAGA____X"]
        ),
        st.text(max_size=20),
    ),
)
def test_any_file_and_environment_load_or_are_refused_with_a_reason(text: str, environ: dict[str, str]) -> None:
    Path("c.yaml").write_text(text, encoding="utf-8")
    try:
        config = load_config(Path("c.yaml"), environ)
    except ConfigInvalid as invalid:
        problems = invalid.problems
    else:
        repr(config)
        return
    assert problems
    assert all(problem and "\n" not in problem for problem in problems)
