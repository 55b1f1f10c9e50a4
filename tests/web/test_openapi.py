"""The OpenAPI document by itself: it is OpenAPI, it is of this application, and every example in it is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import jsonschema_rs
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from quart_trio import QuartTrio

from saga.access import Permission
from saga.audit import MAX_REASON
from saga.authentication import OpenAccess
from saga.drain import Drain
from saga.errors import Invalid
from saga.model import Json, SagaStatus
from saga.names import MAX_NAME
from saga.undo_corrections import read_corrections
from saga.workflow_yaml import parse_workflow
from web import examples
from web.api import Api, Operation
from web.app import DOCUMENTS, create_app
from web.errors import ErrorEnvelope, headers_of, status_of
from web.exchange import JSON
from web.openapi import openapi
from web.pages import PAGES
from web.parsing import parse_body, parse_query
from web.schema import RetryCompensationBody
from web.sign_in import SIGN_IN

OPERATIONS = Api(cast(Any, None), Drain(), cast(Any, None)).operations
DOCUMENT = openapi(OPERATIONS, "1.2.3")
PRINTED = """
from saga.drain import Drain
from web.api import Api
from web.openapi import openapi
print(openapi(Api(None, Drain(), None).operations, "1"))
"""
BY_NAME = {operation.name: operation for operation in OPERATIONS}


def followed(found: dict[str, Any]) -> dict[str, Any]:
    """What is meant by an object of the document that may be a reference."""
    while "$ref" in found:
        target: Any = DOCUMENT
        for part in found["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        found = target
    return found


def described(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["paths"][operation.path][operation.method.lower()]
    return found


def faults(schema: dict[str, Any], value: object) -> list[str]:
    """What is wrong with a value by a schema of the document, formats included."""
    validator = jsonschema_rs.Draft202012Validator(
        {**schema, "components": DOCUMENT["components"]}, validate_formats=True
    )
    return [f"{error.instance_path}: {error.message}" for error in validator.iter_errors(value)]


def parts(found: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, however deep."""
    for name, value in found.items() if isinstance(found, dict) else enumerate(found):
        if name == key:
            yield value
        if isinstance(value, dict | list):
            yield from parts(value, key)


def test_it_is_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    assert DOCUMENT["openapi"] == "3.1.0"
    assert DOCUMENT["info"]["version"] == "1.2.3"


def test_it_has_every_route_that_answers_json_and_no_other() -> None:
    service = cast(Any, type("Service", (), {"max_payload_bytes": 1}))
    app: QuartTrio = create_app(service, authenticator=OpenAccess(), drain=Drain(), version="1")
    others = {*DOCUMENTS, *PAGES, *SIGN_IN}
    offered = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.endpoint not in others
        for method in rule.methods or ()
    }
    told = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert {(method, path) for method, path in offered if method not in ("HEAD", "OPTIONS")} == told
    assert len(told) == 12


def test_each_process_tells_the_same_bytes() -> None:
    told = {
        subprocess.run(
            [sys.executable, "-c", PRINTED],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


def test_every_operation_has_a_name_a_tag_and_words_of_its_own() -> None:
    tags = [tag["name"] for tag in DOCUMENT["tags"]]
    summaries = [described(operation)["summary"] for operation in OPERATIONS]
    assert len(set(summaries)) == len(OPERATIONS)
    for operation in OPERATIONS:
        found = described(operation)
        assert found["operationId"] == operation.name
        assert set(found["tags"]) < set(tags)
    assert {tag for operation in OPERATIONS for tag in described(operation)["tags"]} == set(tags)


def test_every_parameter_and_every_type_is_told_about() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    silent = [name for name, schema in schemas.items() if not schema.get("description")]
    silent += [
        f"{operation.name}: {parameter['name']}"
        for operation in OPERATIONS
        for parameter in map(followed, described(operation)["parameters"])
        if not parameter.get("description")
    ]
    assert silent == []


def test_the_bounds_are_those_of_the_types() -> None:
    listing = {parameter.get("name"): parameter for parameter in described(BY_NAME["listSagas"])["parameters"]}
    assert listing["page_size"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 20}
    assert set(listing["status"]["schema"]["enum"]) == set(SagaStatus)
    assert listing["created_after"]["schema"]["format"] == "date-time"
    assert listing["compensation_failed"]["schema"]["enum"] == ["false", "true"]
    (saga_id,) = (each for each in described(BY_NAME["getSaga"])["parameters"] if each.get("in") == "path")
    assert saga_id["required"]
    assert faults(saga_id["schema"], "nope") != []
    start = DOCUMENT["components"]["schemas"]["StartSagaBody"]
    assert start["required"] == ["workflow_name"]
    assert start["additionalProperties"] is False
    texts = [start["properties"][name] for name in ("workflow_name", "correlation_id", "initiated_by")]
    (key,) = (each for each in described(BY_NAME["startSaga"])["parameters"] if each.get("name") == "Idempotency-Key")
    for text in (*texts, key["schema"]):
        assert [bool(faults(text, "x" * length)) for length in (0, 1, MAX_NAME, MAX_NAME + 1)] == [
            True,
            False,
            False,
            True,
        ]


@pytest.mark.parametrize(
    ("correction", "is_one"),
    [
        ({"input": {}}, True),
        ({"input": {}, "reason": "typo"}, True),
        ({"mark_done": True, "reason": "by hand"}, True),
        ({}, False),
        ({"reason": "why"}, False),
        ({"mark_done": True}, False),
        ({"mark_done": False, "reason": "why"}, False),
        ({"mark_done": True, "reason": " \n"}, False),
        ({"mark_done": True, "reason": "x" * (MAX_REASON + 1)}, False),
        ({"input": {}, "mark_done": True, "reason": "both"}, False),
        ({"input": []}, False),
        ({"input": {}, "other": 1}, False),
    ],
)
def test_the_document_takes_those_corrections_that_the_service_takes(correction: Json, is_one: bool) -> None:
    definition = parse_workflow("name: w\nsteps: [{name: pay, service: s, method: A.B, compensate: A.C}]")
    schema = {"$ref": f"#/components/schemas/{RetryCompensationBody.__name__}"}
    assert (faults(schema, {"steps": {"pay": correction}}) == []) == is_one
    try:
        read_corrections({"pay": correction}, definition, (0,), 1000)
    except Invalid:
        assert not is_one
    else:
        assert is_one


def test_every_body_refuses_what_it_does_not_know() -> None:
    for operation in OPERATIONS:
        if operation.body is not None:
            assert faults({"$ref": f"#/components/schemas/{operation.body.__name__}"}, {"unheard_of": 1}) != []


def test_references_lead_somewhere_and_no_component_is_idle() -> None:
    used = set(parts(DOCUMENT, "$ref"))
    for reference in used:
        followed({"$ref": reference})
    offered = {
        f"#/components/{kind}/{name}"
        for kind, components in DOCUMENT["components"].items()
        if kind != "securitySchemes"
        for name in components
    }
    assert used == offered


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_example_of_a_request_is_taken_by_the_types_that_parse_it(operation: Operation) -> None:
    found = described(operation)
    for parameter in map(followed, found["parameters"]):
        if "example" in parameter:
            assert faults(parameter["schema"], parameter["example"]) == [], parameter["name"]
        if "example" in parameter and parameter["in"] == "query":
            parse_query(f"{parameter['name']}={parameter['example']}".encode(), operation.query)
    if operation.body is None:
        assert "requestBody" not in found
        return
    content = found["requestBody"]["content"][JSON]
    assert content["examples"]
    for example in content["examples"].values():
        assert faults(content["schema"], example["value"]) == []
        parse_body(msgspec.json.encode(example["value"]), JSON, operation.body)


def test_the_example_of_a_workflow_is_one_and_the_corrections_are_those_of_its_steps() -> None:
    (registered,) = examples.REQUESTS["registerWorkflow"].values()
    definition = parse_workflow(cast(Any, registered).workflow_yaml)
    corrected = [
        read_corrections(cast(Any, body).steps, definition, {0}, 1 << 20)
        for body in examples.REQUESTS["retryCompensation"].values()
    ]
    assert [set(each) for each in corrected] == [set(), {0}, {0}]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_answer_has_examples_that_are_valid_and_the_headers_it_comes_with(operation: Operation) -> None:
    is_open = operation.permission is Permission.OPEN
    told = {int(status): followed(answer) for status, answer in described(operation)["responses"].items()}
    guarded = set() if is_open else {401, 403}
    assert set(told) == {*operation.replies, *operation.errors, *guarded, 400, 413, 500, 503}
    for status, answer in told.items():
        content = answer["content"][JSON]
        assert content["examples"], status
        for name, example in content["examples"].items():
            assert faults(content["schema"], example["value"]) == [], name
        for name, header in answer["headers"].items():
            header = followed(header)
            if "example" in header:
                assert faults(header["schema"], header["example"]) == [], name
        assert "X-Request-Id" in answer["headers"]


def test_examples_of_errors_are_those_of_the_status_and_name_their_headers() -> None:
    for status, raised in examples.ERRORS.items():
        (answer,) = (
            followed(described(operation)["responses"][str(status)])
            for operation in OPERATIONS[:1]
            if str(status) in described(operation)["responses"]
        )
        for error in raised.values():
            assert status_of(error)[0] == status
            assert set(headers_of(error)) == set(answer["headers"]) - {"X-Request-Id"}
            assert status_of(error)[1] in answer["description"]


def test_an_example_that_is_untrue_is_found_out() -> None:
    envelope = {"$ref": f"#/components/schemas/{ErrorEnvelope.__name__}"}
    good = {"error": {"code": "SYS_SAGA_CONFLICT", "message": "", "request_id": "", "details": []}}
    assert faults(envelope, good) == []
    assert faults(envelope, {"error": {**good["error"], "code": "SYS_MADE_UP"}}) != []
    view = {"$ref": "#/components/schemas/SagaAccepted"}
    assert faults(view, {"saga_id": "nope", "status": "STARTED"}) != []
    assert faults({"type": "string", "format": "date-time"}, "yesterday") != []


def test_links_name_operations_and_parameters_that_are_there() -> None:
    for operation in OPERATIONS:
        for answer in map(followed, described(operation)["responses"].values()):
            for link in answer.get("links", {}).values():
                target = BY_NAME[link["operationId"]]
                names = {parameter.get("name") for parameter in described(target)["parameters"]}
                assert set(link["parameters"]) <= names
