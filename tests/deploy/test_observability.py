"""Dashboard and alert rules: every expression is PromQL over metrics and labels that `docs/metrics.md` names, which
`tests/server/test_metrics_document.py` holds against what servers print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from promql_parser import AggModifierType

from tests.server.test_metrics_document import written

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())

OF_THE_TARGET = frozenset({"instance", "job", "worker"})
"""Labels that Prometheus adds to what it scrapes, and the one that several workers have."""
WIDTH = 24
PARTS = ("lhs", "rhs", "expr", "args", "vector_selector", "param")
"""Where the parts of an expression hang."""


def known_series() -> dict[str, frozenset[str]]:
    """Every series a scrape gives, with its labels."""
    found = {"up": OF_THE_TARGET}
    for name, (kind, labels) in written().items():
        labels |= OF_THE_TARGET
        if kind == "histogram":
            found |= {f"{name}_count": labels, f"{name}_sum": labels, f"{name}_bucket": labels | {"le"}}
        else:
            found[name] = labels
    return found


def nodes(expression: Any) -> Iterator[Any]:
    yield expression
    for part in PARTS:
        hanging = getattr(expression, part, None)
        for one in hanging if isinstance(hanging, list) else [hanging]:
            if one is not None:
                yield from nodes(one)


def faults(text: str) -> list[str]:
    """What is wrong with an expression; ValueError: it is not PromQL."""
    known = known_series()
    found: list[str] = []
    named: set[str] = set()
    parsed = list(nodes(promql_parser.parse(text)))
    for node in parsed:
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in known:
                found.append(f"no metric {node.name}")
            else:
                named |= known[node.name]
                asked = {matcher.name for matcher in node.matchers.matchers}
                found += [f"{node.name} has no label {label}" for label in sorted(asked - known[node.name])]
    for node in parsed:
        modifier = getattr(node, "modifier", None)
        matching = getattr(modifier, "matching", modifier)
        for label in getattr(matching, "labels", []):
            if label not in named:
                found.append(f"nothing has the label {label} to go by")
    return found


def labels_left(text: str) -> frozenset[str]:
    """The labels of the results of an alert: what its outermost aggregations go by, if it has any."""
    bys = [
        frozenset(node.modifier.labels if node.modifier is not None else ())
        for node in nodes(promql_parser.parse(text))
        if isinstance(node, promql_parser.AggregateExpr)
        and (node.modifier is None or node.modifier.type == AggModifierType.By)
    ]
    return bys[0] if bys else OF_THE_TARGET


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DASHBOARD["panels"]
    return found


def plain(expression: str) -> str:
    """An expression as Grafana sends it, with its variables put in."""
    put_in = {"$__rate_interval": "5m", "$instance": ".*", "$workflow": ".*"}
    for variable, value in put_in.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def test_what_is_wrong_with_an_expression_is_found() -> None:
    assert faults("sum by (workflow) (rate(saga_started_total[5m]))") == []
    assert faults("rate(saga_begun_total[5m])") == ["no metric saga_begun_total"]
    assert faults('saga_undo_debt{status="failed"}') == ["saga_undo_debt has no label status"]
    assert faults("sum by (shop) (saga_active)") == ["nothing has the label shop to go by"]
    assert faults("saga_ready and on (shop) saga_active") == ["nothing has the label shop to go by"]
    assert faults("rate(saga_duration_seconds[5m])") == ["no metric saga_duration_seconds"]
    with pytest.raises(ValueError, match="parenthesis"):
        faults("sum(saga_active")


# --- alert rules ------------------------------------------------------------------------------------------------------


def test_alert_rules_have_the_form_prometheus_reads() -> None:
    assert set(RULES) == {"groups"}
    assert len({group["name"] for group in RULES["groups"]}) == len(RULES["groups"])
    for group in RULES["groups"]:
        assert set(group) == {"name", "rules"}
    for rule in alerts():
        assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}, rule
        assert re.fullmatch(r"Saga[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        assert set(rule["labels"]) == {"severity"}
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert re.match(r"1\. \S", rule["annotations"]["runbook"]), rule["alert"]
    assert len({rule["alert"] for rule in alerts()}) == len(alerts())


def test_every_alert_asks_for_metrics_and_labels_that_there_are() -> None:
    for rule in alerts():
        assert faults(rule["expr"]) == [], rule["alert"]


def test_the_words_of_an_alert_name_labels_its_expression_leaves_and_alerts_that_there_are() -> None:
    names = {rule["alert"] for rule in alerts()}
    for rule in alerts():
        words = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", words)) <= labels_left(rule["expr"]), rule["alert"]
        assert set(re.findall(r"\bSaga[A-Z]\w+", words)) <= names, rule["alert"]
        series = set(re.findall(r"\bsaga_[a-z_]+[a-z]\b", words)) - {"saga_id", "saga_crashed", "saga_states"}
        assert series <= known_series().keys() | written().keys(), rule["alert"]


def test_there_is_an_alert_for_each_thing_that_must_not_go_unseen() -> None:
    asked = {
        node.name
        for rule in alerts()
        for node in nodes(promql_parser.parse(rule["expr"]))
        if isinstance(node, promql_parser.VectorSelector)
    }
    assert asked >= {
        "saga_undo_debt",
        "saga_undo_debt_oldest_seconds",
        "saga_outbox_oldest_seconds",
        "saga_worker_leases_lost_total",
        "saga_http_requests_total",
        "saga_grpc_calls_total",
        "saga_participant_calls_total",
        "saga_group_commit_failures_total",
        "saga_ready",
        "saga_check_ok",
        "saga_jwks_fetches_total",
        "saga_log_lines_lost_total",
        "saga_audit_denials_lost_total",
        "saga_spans_lost_total",
        "saga_tls_certificate_expiry_timestamp_seconds",
    }


# --- dashboard --------------------------------------------------------------------------------------------------------


def test_every_panel_asks_for_metrics_and_labels_that_there_are() -> None:
    for panel in panels():
        for target in panel.get("targets", []):
            assert faults(plain(target["expr"])) == [], panel["title"]
            left = labels_left(plain(target["expr"])) | OF_THE_TARGET
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left, panel["title"]


def test_every_metric_is_on_the_dashboard_save_those_that_say_little_by_themselves() -> None:
    asked = set()
    for panel in panels():
        for target in panel.get("targets", []):
            for node in nodes(promql_parser.parse(plain(target["expr"]))):
                if isinstance(node, promql_parser.VectorSelector):
                    asked.add(re.sub(r"_(bucket|sum|count)$", "", str(node.name)))
    little = {"process_virtual_memory_bytes", "process_start_time_seconds"}
    assert written().keys() - asked == little


def test_every_panel_and_query_has_a_number_of_its_own() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        letters = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(letters)) == len(letters)
        assert letters or panel["type"] == "row"


def test_every_panel_asks_the_source_the_reader_chose() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asking = [panel for panel in panels() if panel["type"] != "row"]
    sources = [panel["datasource"] for panel in asking]
    sources += [target["datasource"] for panel in asking for target in panel["targets"]]
    sources += [variable["datasource"] for variable in variables.values() if variable["type"] == "query"]
    assert all(source == chosen for source in sources)
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels())))
    assert used - {"__rate_interval"} == set(variables)
    for variable in variables.values():
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]  # a variable of another form is to fail here
            assert label in known_series()[metric]


def test_no_panel_lies_on_another_and_each_row_holds_some() -> None:
    taken: dict[tuple[int, int], int] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= WIDTH
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"], panel["title"]
    kinds = [panel["type"] for panel in panels()]
    assert kinds[0] == "row"
    assert "row" not in {first for first, second in zip(kinds, [*kinds[1:], "row"], strict=True) if second == "row"}
    assert [panel["title"] for panel in panels() if panel["type"] == "row"] == [
        "Now",
        "Traffic",
        "Latency",
        "Undo debt",
        "Compensation failures",
        "Participants",
        "Store",
        "Outbox",
        "Workers",
        "Doors",
    ]
