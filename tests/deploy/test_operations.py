"""`docs/operations.md`: what is to be copied from it fits the command line, the routes, the defaults and the alerts."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from saga.readiness import CHECK_SECS
from server.cli import _parser
from server.config import SagaConfig
from server.workers import STOP_SECS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
GRACE_SECS = SagaConfig().shutdown_grace_secs


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_the_unit_runs_a_command_there_is_and_lets_a_drain_end() -> None:
    (text,) = blocks("ini")
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(text)
    service = unit["Service"]
    _, *arguments = shlex.split(service["ExecStart"])
    assert _parser().parse_args(arguments).config == Path("/etc/saga/config.yaml")
    assert int(service["TimeoutStopSec"]) > GRACE_SECS + STOP_SECS


def test_the_probes_ask_routes_there_are_and_wait_longer_than_readiness_takes() -> None:
    container: dict[str, Any] = yaml.safe_load(blocks("yaml")[0])
    probes = {name: probe for name, probe in container.items() if name.endswith("Probe")}
    asked = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert asked == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    for probe in probes.values():
        assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}
        assert probe["timeoutSeconds"] > CHECK_SECS
    (grace,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", TEXT)
    assert int(grace) > GRACE_SECS + STOP_SECS


def test_the_job_that_is_scraped_is_the_one_that_alerts_ask_for() -> None:
    (job,) = yaml.safe_load(blocks("yaml")[1])["scrape_configs"]
    rules = (ROOT / "deploy" / "observability" / "alerts.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r'job="([^"]*)"', rules)) == {job["job_name"]}
