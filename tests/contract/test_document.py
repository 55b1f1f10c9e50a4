"""The document and the server say the same: every operation, as each role and as nobody. `make fuzz` asks more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.contract import campaign
from tests.contract.landscape import ROLES, Landscape, landscape


@pytest.fixture(name="land", scope="module")
def _land(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Landscape]:
    with landscape(tmp_path_factory.mktemp("contract")) as land:
        yield land
        land.target.check()


PHASES = {
    # What the bounds of the document give is the same for all; who may ask is told by a few of each operation.
    "admin": ("examples", "coverage"),
    "operator": ("fuzzing", "stateful"),
    "auditor": ("fuzzing",),
    "nobody": ("fuzzing",),
}


@pytest.mark.parametrize("name", sorted(ROLES))
def test_the_server_answers_each_role_as_the_document_and_the_matrix_say(land: Landscape, name: str) -> None:
    outcome = campaign.run(land, name, examples=5, seed=1, phases=PHASES[name])
    assert outcome.faults == []
    asked = {operation for operation, _ in outcome.statuses}
    paths = land.document()["paths"]
    assert asked == {f"{method.upper()} {path}" for path, item in paths.items() for method in item}


def _a_field_is_something_else(document: dict[str, Any]) -> None:
    document["components"]["schemas"]["SagaView"]["properties"]["attempt"]["type"] = "string"


def _a_status_is_missing(document: dict[str, Any]) -> None:
    del document["paths"]["/api/v1/sagas/{saga_id}"]["get"]["responses"]["404"]


def _a_bound_is_another(document: dict[str, Any]) -> None:
    for parameter in document["paths"]["/api/v1/sagas"]["get"]["parameters"]:
        if parameter.get("name") == "page_size":
            parameter["schema"]["maximum"] = 100_000


@pytest.mark.parametrize(
    ("path", "spoil", "told"),
    [
        ("/api/v1/sagas/{saga_id}", _a_field_is_something_else, "response_schema_conformance"),
        ("/api/v1/sagas/{saga_id}", _a_status_is_missing, "status_code_conformance"),
        ("/api/v1/sagas", _a_bound_is_another, "the document does not say why: [{'field': 'page_size'"),
    ],
    ids=("a field", "a status", "a bound"),
)
def test_a_document_that_is_untrue_is_found_out(
    land: Landscape, path: str, spoil: Callable[[dict[str, Any]], None], told: str
) -> None:
    document = land.document()
    spoil(document)
    document["paths"] = {path: {"get": document["paths"][path]["get"]}}
    outcome = campaign.run(land, "admin", examples=5, seed=1, phases=("coverage",), document=document)
    assert any(told in fault for fault in outcome.faults), outcome.faults
