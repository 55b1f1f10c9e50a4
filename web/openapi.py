"""The OpenAPI 3.1 document, made from the table of operations and the very types that requests are parsed into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from saga.access import GRANTS, Permission
from web.api import Operation
from web.errors import ErrorEnvelope
from web.schema import PATH_VALUES

_BEARER = "bearer"
_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "Asked for where the server is configured with `auth`. "
    + " ".join(
        f"`{role.value}` may {', '.join(sorted(each.value for each in granted - {Permission.OPEN}))}."
        for role, granted in GRANTS.items()
    ),
}
_REF = "#/components/schemas/{name}"


def openapi(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """The document as plain data."""
    types: list[Any] = [ErrorEnvelope]
    for operation in operations:
        types += operation.replies.values()
        types += [operation.body] if operation.body else []
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Saga orchestrator",
            "version": version,
            "description": "Runs sagas: business transactions across services, each step with its undo beside it.",
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {_BEARER: _SCHEME}},
    }


def _operation(operation: Operation) -> dict[str, Any]:
    guarded = () if operation.permission is Permission.OPEN else (401, 403)
    described: dict[str, Any] = {
        "operationId": operation.name,
        "security": [{_BEARER: []}] if guarded else [],
        "summary": operation.summary,
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, "schema": msgspec.json.schema(PATH_VALUES[name])}
                for name in re.findall(r"{(\w+)}", operation.path)
            ),
            *(_query_parameter(info) for info in msgspec.structs.fields(operation.query)),
            *(_header_parameter(name, type_) for name, type_ in operation.headers.items()),
        ],
        "responses": {
            **{str(status): _response(status, type_) for status, type_ in operation.replies.items()},
            **{str(status): _response(status, ErrorEnvelope) for status in (*guarded, *operation.errors, 500)},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {"required": operation.body_required, "content": _content(operation.body)}
    return described


def _query_parameter(info: msgspec.structs.FieldInfo) -> dict[str, Any]:
    # Inlined: a parameter is one value, and None is how its absence is held here, not something to be sent.
    (schema,), components = msgspec.json.schema_components([info.type], ref_template=_REF)
    while "$ref" in schema:
        schema = components[schema["$ref"].rpartition("/")[2]]
    description = schema.pop("description", None)
    arms = [arm for arm in schema.pop("anyOf", []) if arm != {"type": "null"}]
    for arm in arms:
        schema |= components[arm["$ref"].rpartition("/")[2]] if "$ref" in arm else arm
    if "enum" in schema:
        schema["enum"] = [value for value in schema["enum"] if value is not None]
    schema.pop("title", None)
    parameter: dict[str, Any] = {"name": info.name, "in": "query", "schema": schema}
    if description is not None:
        parameter["description"] = description
    if info.default not in (None, msgspec.NODEFAULT):
        schema["default"] = info.default
    return parameter


def _header_parameter(name: str, type_: Any) -> dict[str, Any]:
    schema = msgspec.json.schema(type_)
    return {"name": name, "in": "header", "description": schema.pop("description"), "schema": schema}


def _response(status: int, type_: type) -> dict[str, Any]:
    return {"description": HTTPStatus(status).phrase, "content": _content(type_)}


def _content(type_: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(name=type_.__name__)}}}
