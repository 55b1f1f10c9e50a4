"""Schemathesis against a server that runs: every operation of `/openapi.json`, asked by one role or by nobody.

All its checks are on. Beside them every answer is held against the matrix of access, a refusal of what the document
allows against the few rules that a schema cannot say, and the whole against how far each role comes at least.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import schemathesis
from schemathesis import Case, Config, HookContext, Response
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.contract.landscape import WORKFLOWS, Landscape

PHASES = ("examples", "coverage", "fuzzing", "stateful")
RECENT_IDS = 20
"""Sagas that a campaign has started and asks for, beside those of the landscape."""
WAIT_SECS = 0.05
"""The longest poll of a case; some sagas run for an hour."""

BEYOND_A_SCHEMA = {
    "startSaga": {("*", "characters"), ("*", "nul_character")},
    "listSagas": {("*", "characters"), ("cursor", "malformed"), ("page", "out_of_range")},
    "listAudit": {("*", "characters"), ("cursor", "malformed")},
    "registerWorkflow": {("*", "*")},
    "cancelSaga": {("reason", "characters")},
    "compensateSaga": {("reason", "characters")},
    "retryCompensation": {("*", "unknown"), ("*", "not_failed"), ("*", "nul_character"), ("*", "characters")},
}
"""By operation, the fields and reasons of a 400 that a request the document allows may meet: which characters print,
where a list goes on, what a workflow is, which steps a saga has. `*`: any."""

FRAMING = ("Transfer-Encoding", "Content-Length", "Connection", "Upgrade", "Expect", "Host")
"""Headers that the HTTP server below the API goes by, and answers by itself; `hostile` sends them."""

ANSWERS = frozenset({200, 201, 202, 400, 404, 405, 409, 413})
"""What whoever may do something can be told."""
WAITED_SECS = 1.0
"""What gives up with a 503 has waited longer (`CHECK_SECS`, `WRITE_SECS`); what refuses with one has not waited."""

REACHED = {
    "POST /api/v1/sagas": {201},
    "POST /api/v1/sagas/{saga_id}/cancel": {409},
    "POST /api/v1/sagas/{saga_id}/compensate": {409},
    "POST /api/v1/sagas/{saga_id}/retry-compensation": {409},
    "POST /api/v1/workflows": {201},
}
"""How far who may change things comes at least."""
REACHED_IN_COVERAGE = {
    "POST /api/v1/sagas": {201, 400, 404, 409},
    "GET /api/v1/sagas": {200, 400},
    "GET /api/v1/sagas/{saga_id}": {200, 400, 404},
    "POST /api/v1/sagas/{saga_id}/cancel": {200, 404, 409},
    "POST /api/v1/sagas/{saga_id}/retry-compensation": {202, 400, 404, 409},
    "POST /api/v1/workflows": {201, 400},
    "GET /api/v1/workflows/{name}": {200, 404},
    "GET /api/v1/audit": {200, 400},
}
"""How far, with all that the bounds of the document give."""


MOST_UNAVAILABLE = 0.02
"""The share of answers that may be 503 (`_is_slow_machine`). A guess."""


@dataclass
class Outcome:
    """What came of a campaign: the answers by operation and status, and everything that should not be."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.statuses.total()


def run(
    land: Landscape,
    name: str,
    *,
    examples: int,
    seed: int,
    phases: Sequence[str] = PHASES,
    document: Mapping[str, Any] | None = None,
) -> Outcome:
    """Asks as `name` of `ROLES`. `examples`: random requests of each operation, and random chains of them; what the
    document's bounds give comes once beside them. The same `seed` asks the same. `document`: held against instead of
    the server's own."""
    headers = land.headers(name)
    schema = _schema(land, _config(headers, examples, seed, phases), document)
    _lead(schema, _Guide(land.saga_ids))
    outcome = Outcome()
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            _note_answers(outcome, name, headers, event.recorder)
            _note_checks(outcome, name, event.recorder)
        elif isinstance(event, events.NonFatalError):
            outcome.faults.append(f"{name}: {event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            raise event.exception
        elif isinstance(event, events.EngineFinished):
            outcome.faults += [f"{name}: {failure}" for failure in event.failures]
    _note_unreached(outcome, name, schema, is_covered="coverage" in phases)
    unavailable = sum(count for (_, status), count in outcome.statuses.items() if status == 503)
    if unavailable > MOST_UNAVAILABLE * outcome.cases:
        outcome.faults.append(f"{name}: 503 {unavailable} times in {outcome.cases} answers")
    return outcome


def _config(headers: Mapping[str, str], examples: int, seed: int, phases: Sequence[str]) -> Config:
    return Config.from_dict(
        {
            "seed": seed,
            "headers": headers,
            "continue-on-failure": True,
            "request-timeout": 120,
            "generation": {
                "max-examples": examples,
                "no-shrink": True,
                "database": "none",
                # Whoever has a token sends that one; nobody sends all kinds.
                "with-security-parameters": not headers,
            },
            # Which 503 may be is looked at here: see `_is_slow_machine`.
            "checks": {
                "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503"]},
                "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "401", "403", "404", "409", "503"]},
            },
            "suppress-health-check": ["all"],
            # What comes after an answer would otherwise depend on what it says, and the seed not tell it.
            "phases": {
                phase: {
                    "enabled": phase in phases,
                    **({} if phase == "stateful" else {"extra-data-sources": {"responses": False}}),
                    **({"error-feedback": {"enabled": False}} if phase == "fuzzing" else {}),
                }
                for phase in PHASES
            },
        }
    )


def _schema(land: Landscape, config: Config, document: Mapping[str, Any] | None) -> OpenApiSchema:
    if document is None:
        return schemathesis.openapi.from_url(f"{land.url}/openapi.json", config=config)
    config.projects.default.update(base_url=land.url)
    return schemathesis.openapi.from_dict(dict(document), config=config)


def _lead(schema: OpenApiSchema, guide: _Guide) -> None:
    @schema.hook
    def map_case(context: HookContext, case: Case[Any]) -> Case[Any]:
        guide.lead(case)
        for framing in FRAMING:
            case.headers.pop(framing, None)
        return case

    @schema.hook
    def after_call(context: HookContext, case: Case[Any], response: Response) -> None:
        if case.operation.label == "POST /api/v1/sagas" and response.status_code == 201:
            guide.note_started(response.json()["saga_id"])


class _Guide:
    """Puts names and ids that exist into most of what the document allows, so that it comes far; by turns, so that
    the first few requests of an operation meet a saga in each state."""

    def __init__(self, saga_ids: Sequence[str]) -> None:
        self._kept = tuple(saga_ids)
        self._recent: deque[str] = deque(maxlen=RECENT_IDS)
        self._turns: Counter[str] = Counter()

    def note_started(self, saga_id: str) -> None:
        self._recent.append(saga_id)

    def lead(self, case: Case[Any]) -> None:
        if not _is_valid(case):
            if "wait_secs" in case.query and _is_long(case.query["wait_secs"]):
                case.query = {**case.query, "wait_secs": WAIT_SECS}
            return
        if "wait_secs" in case.query:
            case.query = {**case.query, "wait_secs": WAIT_SECS}
        turn = self._turns[case.operation.label]
        self._turns[case.operation.label] += 1
        if turn % 5 == 4:
            return
        saga_ids = (*self._kept, *self._recent)
        name = tuple(WORKFLOWS)[turn % len(WORKFLOWS)]
        if "saga_id" in case.path_parameters:
            case.path_parameters = {**case.path_parameters, "saga_id": saga_ids[turn % len(saga_ids)]}
        if "name" in case.path_parameters:
            case.path_parameters = {**case.path_parameters, "name": name}
        if "Idempotency-Key" in case.headers:
            case.headers["Idempotency-Key"] = f"{turn - turn % 2}"
        if not isinstance(case.body, dict):
            return
        if "workflow_name" in case.body:
            case.body = {**case.body, "workflow_name": name}
        if "workflow_yaml" in case.body:
            text = WORKFLOWS[name].replace("name: ", "name: another ", 1)
            case.body = {**case.body, "workflow_yaml": f"{text}timeout_secs: {turn % 5 + 60}\n"}
        if "steps" in case.body and turn % 2 == 0:
            case.body = {"steps": {}}


def _is_long(value: object) -> bool:
    """Whether the server would take it for a time to wait."""
    try:
        return WAIT_SECS < float(str(value)) <= 60
    except ValueError:
        return False


def _note_answers(outcome: Outcome, name: str, headers: Mapping[str, str], recorder: ScenarioRecorder) -> None:
    for case_id, interaction in recorder.interactions.items():
        case, response = recorder.cases[case_id].value, interaction.response
        asked = f"{name}: {interaction.request.method} {interaction.request.uri} {interaction.request.body!r}"
        if response is None:
            outcome.faults.append(f"{asked}: no answer")
            continue
        outcome.statuses[case.operation.label, response.status_code] += 1
        if _is_slow_machine(response):
            continue
        sent = interaction.request.headers.get("Authorization", [])
        is_known = bool(headers) and sent == [headers["Authorization"]]
        if response.status_code not in _may_answer(case, name if is_known else "nobody", interaction.request.uri):
            outcome.faults.append(f"{asked}: {response.status_code} is not what the matrix of access says")
        if response.status_code == 400 and _is_valid(case) and (untold := _untold(case, response)):
            outcome.faults.append(f"{asked}: refused, and the document does not say why: {untold}")


def _note_checks(outcome: Outcome, name: str, recorder: ScenarioRecorder) -> None:
    for case_id, checks in recorder.checks.items():
        for check in checks:
            if check.status is Status.FAILURE and check.failure_info is not None:
                failure = check.failure_info.failure
                outcome.faults.append(
                    f"{name}: {failure.operation}: {check.name}: {failure.message}\n{check.failure_info.code_sample}"
                )
            elif check.status is Status.ERROR:
                outcome.faults.append(f"{name}: {recorder.cases[case_id].value.operation.label}: {check.name} broke")


def _note_unreached(outcome: Outcome, name: str, schema: OpenApiSchema, *, is_covered: bool) -> None:
    for path, item in schema.raw_schema["paths"].items():
        for method, definition in item.items():
            operation = f"{method.upper()} {path}"
            least = _least(operation, name, is_open=not definition["security"], is_covered=is_covered)
            for status in sorted(least):
                if not outcome.statuses[operation, status]:
                    outcome.faults.append(f"{name}: {operation}: never answered {status}")


def _least(operation: str, name: str, *, is_open: bool, is_covered: bool) -> set[int]:
    """The statuses that somebody with that name meets in a few requests, `is_covered`: in those of the bounds too."""
    is_read = operation.startswith("GET ")
    if is_open:
        return {200}
    if name == "nobody":
        return {401}
    if name == "auditor":
        return {200} if is_read else {403}
    least = {200} if is_read else REACHED[operation]
    return least | REACHED_IN_COVERAGE.get(operation, set()) if is_covered else least


def _is_slow_machine(response: Response) -> bool:
    """One request at a time fills nothing, so that a 503 can only be told after something was waited for in vain, for
    seconds: the store, on a machine that has much else to do. One that comes at once is a fault."""
    return response.status_code == 503 and response.elapsed >= WAITED_SECS


def _may_answer(case: Case[Any], name: str, uri: str) -> frozenset[int]:
    """The statuses spec section 9 leaves to a request of somebody with that name."""
    operation = case.operation
    if not operation.definition.raw["security"]:
        return ANSWERS
    if name == "nobody":
        return frozenset({401})
    if name != "auditor" or operation.method.upper() == "GET":
        return ANSWERS
    is_other_route = operation.path.count("/") != unquote(urlsplit(uri).path).count("/") or "//" in uri[8:]
    if case.method.upper() != operation.method.upper() or is_other_route:
        return frozenset({403, 404, 405})
    return frozenset({403})


def _is_valid(case: Case[Any]) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive


_BEYOND_CALENDARS = re.compile(r"^(?:0000|0001|9999)-|:60")
"""RFC 3339 has a year 0 and leap seconds, and an offset may lead out of the calendar at either end."""


def _untold(case: Case[Any], response: Response) -> list[dict[str, Any]]:
    """The details of a refusal that no rule beyond the document's schemas explains."""
    allowed = BEYOND_A_SCHEMA.get(case.operation.definition.raw["operationId"], set())

    def is_told(detail: dict[str, Any]) -> bool:
        field, reason = str(detail.get("field")), detail.get("reason")
        is_odd_instant = _BEYOND_CALENDARS.search(str(case.query.get(field, "")))
        return bool(is_odd_instant or allowed & {(field, reason), ("*", reason), ("*", "*")})

    return [detail for detail in response.json()["error"]["details"] or [{}] if not is_told(detail)]
