"""Builds the request of a step from the saga's payload and the responses of the steps before it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from saga.errors import MappingFailed
from saga.expressions import BadExpression, Budget, EvaluationFailed, compile_expression
from saga.model import Json, Saga, StepAction
from saga.workflow import Step


def build_request(step: Step, action: StepAction, saga: Saga, responses: Mapping[str, Json]) -> tuple[Json, bool]:
    """The JSON object to send, and whether keys the request message lacks fail the call (`StepCall.strict`).

    Without `input` (for a compensation `compensate_input`) it is the saga's payload as it is: that very object, not
    strict. With one it is what its expressions give over `{saga, payload, steps}`, strict. `responses`: the response of
    each step that succeeded, by name. `MappingFailed`, and nothing else, when there is no such object.
    """
    executing = action is StepAction.EXECUTE
    template = step.input if executing else step.compensate_input
    if template is None:
        return saga.payload, False
    path = "input" if executing else "compensate_input"
    built = _build(template, path, _values(saga, responses), Budget())
    if not isinstance(built, dict):
        raise MappingFailed(path, f"expected an object, the expression gave {_named(built)}")
    return built, True


def _values(saga: Saga, responses: Mapping[str, Json]) -> dict[str, Any]:
    return {
        "saga": {
            "saga_id": saga.saga_id,
            "workflow_name": saga.workflow_name,
            "workflow_version": saga.workflow_version,
            "correlation_id": saga.correlation_id,
            "initiated_by": saga.initiated_by,
            "created_at": rfc3339(saga.created_at),
        },
        "payload": saga.payload,
        "steps": {name: {"response": response} for name, response in responses.items()},
    }


def _build(template: Any, path: str, values: dict[str, Any], budget: Budget) -> Any:
    """Depth is that of the YAML, which `yaml_nodes.MAX_DEPTH` bounds."""
    if isinstance(template, str):
        try:
            return compile_expression(template).evaluate(values, budget)
        except (BadExpression, EvaluationFailed) as error:
            raise MappingFailed(path, str(error)) from error
    if isinstance(template, dict):
        return {key: _build(value, f"{path}.{key}", values, budget) for key, value in template.items()}
    if isinstance(template, list):
        return [_build(value, f"{path}[{index}]", values, budget) for index, value in enumerate(template)]
    return template


def _named(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "a boolean"), (str, "a string"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return "a number"


def rfc3339(instant: datetime) -> str:
    """An instant as everywhere in JSON: RFC 3339, UTC, milliseconds, `Z`."""
    return instant.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
