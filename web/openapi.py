"""The OpenAPI 3.1 document, made from the table of operations and the very types that requests are parsed into.

What all calls have in common is said once, under `components`: the errors by status, the id of a request, the headers
of answers. The document depends on nothing but the code: the same release tells the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from saga.access import GRANTS, Permission
from saga.door_limits import BODY_SECS, MAX_HEADERS
from web import examples, schema
from web.api import DOOR_ERRORS, Operation, Tag
from web.errors import ErrorEnvelope, envelope, status_of
from web.exchange import JSON
from web.parsing import MAX_QUERY_FIELDS

_BEARER = "bearer"
_SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "Asked for where the server is configured with `auth`; else everybody may do everything. "
    + " ".join(
        f"`{role.value}` may {', '.join(sorted(each.value for each in granted - {Permission.OPEN}))}."
        for role, granted in GRANTS.items()
    )
    + " The cookie of the pages is good for the pages only.",
}
_ABOUT = """\
Runs sagas: business transactions across services, each step with its undo beside it.

JSON both ways, in UTF-8; a `Content-Type` that is not JSON is 400. Instants are RFC 3339, answered in UTC with \
milliseconds. Fields of a body that are unknown, and parameters that are unknown or given twice, are refused with 400. \
Answers may get more fields in later releases. The `X-Request-Id` of a request, or a new one, is in its answer, in the \
envelope of an error, and in the log.

`HEAD` works where `GET` does, and `OPTIONS` answers with `Allow`. Any other method of a path is 405, with the \
envelope of errors and `Allow`; a path that is not here is 404. What is no HTTP, or has headers over 64 KiB, is \
refused below this API, with 400, 431 or 501 and without a body.

Beside these calls there are pages for people at `/`, metrics for Prometheus at `/metrics`, and this document at \
`/openapi.json` and, to be read, at `/docs`.\
"""
_TAGS = {
    Tag.SAGAS: "Start, read, cancel, and repair sagas.",
    Tag.WORKFLOWS: "What sagas run: steps and their undos.",
    Tag.AUDIT: "Who asked for which change.",
    Tag.HEALTH: "For whoever supervises the process. Nobody is asked for a token.",
}
_ERRORS = {
    400: (
        "Invalid",
        "A field, a parameter or a workflow breaks a rule; every fault is told at once, in `details`. Also more than"
        f" {MAX_HEADERS} headers or {MAX_QUERY_FIELDS} parameters, and a body that takes longer than {BODY_SECS:g} s.",
    ),
    401: ("Unauthenticated", "No token came, or one that is not, or no longer, good."),
    403: ("PermissionDenied", "None of the token's roles may do this."),
    404: ("NotFound", "No such saga or workflow."),
    409: (
        "Conflict",
        "What is stored forbids it: the saga has ended, has nothing to retry, or the idempotency key came with another"
        " body.",
    ),
    413: ("TooLarge", "The body, or the payload in it, is over the limit."),
    500: ("Internal", "An error of ours. The log tells more under the id of the request."),
    503: (
        "Unavailable",
        "The database cannot be reached: whether a change was made is unknown. Or there is more to do than the server"
        " takes on: nothing was begun. Try again.",
    ),
}
"""By status, the name of the answer in the document and when it is given."""

_HEADERS: Mapping[str, tuple[Any, tuple[int, ...]]] = {
    "X-Request-Id": (schema.RequestId, ()),
    "WWW-Authenticate": (schema.Challenge, (401, 403)),
    "Retry-After": (schema.RetryAfter, (503,)),
}
"""Headers of answers that are no operation's own, by the errors they come with. The first is in every answer."""


def openapi(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """The document as plain data."""
    types: list[Any] = [ErrorEnvelope]
    for operation in operations:
        types += operation.replies.values()
        types += [operation.body] if operation.body else []
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    asked = {operation.body.__name__ for operation in operations if operation.body}
    for name, component in components.items():
        if name not in asked:
            _never_left_out(component)
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Saga orchestrator", "version": version, "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag.value, "description": _TAGS[tag]} for tag in Tag],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {name: _error(status, when) for status, (name, when) in _ERRORS.items()},
            "parameters": {"X-Request-Id": _parameter("X-Request-Id", "header", schema.SentRequestId)},
            "headers": {name: _header(type_) for name, (type_, _) in _HEADERS.items()},
            "securitySchemes": {_BEARER: _SCHEME},
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    is_open = operation.permission is Permission.OPEN
    guarded = () if is_open else (401, 403)
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [operation.tag.value],
        "summary": operation.summary,
        "description": _told(operation),
        "security": [] if is_open else [{_BEARER: []}],
        "parameters": [
            *(
                {**_parameter(name, "path", schema.PATH_VALUES[name]), "required": True}
                for name in re.findall(r"{(\w+)}", operation.path)
            ),
            *(_query_parameter(info) for info in msgspec.structs.fields(operation.query)),
            *(_parameter(name, "header", type_) for name, type_ in operation.headers.items()),
            {"$ref": "#/components/parameters/X-Request-Id"},
        ],
    }
    if operation.body is not None:
        shown = {name: _without_defaults(body) for name, body in examples.REQUESTS[operation.name].items()}
        described["requestBody"] = {
            "required": operation.body_required,
            "content": _content(_reference(operation.body), shown),
        }
    described["responses"] = _responses(operation, (*guarded, *operation.errors, *DOOR_ERRORS))
    return described


def _never_left_out(component: dict[str, Any]) -> None:
    """In an answer a field is there also where it has its default."""
    for name, field in component.get("properties", {}).items():
        if "default" in field:
            del field["default"]
            component["required"].append(name)


def _told(operation: Operation) -> str:
    """The description, and who may do it."""
    roles = [role.value for role, granted in GRANTS.items() if operation.permission in granted]
    may = (
        "Nobody is asked for a token."
        if operation.permission is Permission.OPEN
        else f"Needs the permission to {operation.permission.value}: {', '.join(f'`{role}`' for role in roles)}."
    )
    return f"{operation.description}\n\n{may}" if operation.description else may


def _responses(operation: Operation, errors: Iterable[int]) -> dict[str, Any]:
    found: dict[int, dict[str, Any]] = {
        status: {"$ref": f"#/components/responses/{_ERRORS[status][0]}"} for status in errors
    }
    for status, type_ in operation.replies.items():
        shown = {name: _plain(reply) for name, reply in examples.REPLIES[operation.name][status].items()}
        reply: dict[str, Any] = {
            "description": (type_.__doc__ or "").strip(),
            "headers": _shared_headers(),
            "content": _content(_reference(type_), shown),
        }
        if status in found:
            # The door may have refused the request before the operation saw it.
            reply["content"] = _content({"anyOf": [_reference(type_), _reference(ErrorEnvelope)]}, shown)
            reply["headers"] |= {
                name: {**_header(header), "required": False}
                for name, (header, where) in _HEADERS.items()
                if status in where
            }
        if status < 300:
            reply["headers"] |= {name: _header(header) for name, header in operation.reply_headers.items()}
            if operation.links:
                reply["links"] = {
                    name: {"operationId": name, "parameters": dict(parameters)}
                    for name, parameters in operation.links.items()
                }
        found[status] = reply
    return {str(status): found[status] for status in sorted(found)}


def _error(status: int, when: str) -> dict[str, Any]:
    raised = examples.ERRORS[status]
    codes = dict.fromkeys(f"`{status_of(error)[1]}`" for error in raised.values())
    return {
        "description": f"{when} {', '.join(codes)}.",
        "headers": _shared_headers(status),
        "content": _content(
            _reference(ErrorEnvelope),
            {name: msgspec.json.decode(envelope(error, examples.REQUEST_ID)) for name, error in raised.items()},
        ),
    }


def _shared_headers(status: int | None = None) -> dict[str, Any]:
    return {
        name: {"$ref": f"#/components/headers/{name}"}
        for name, (_, statuses) in _HEADERS.items()
        if not statuses or status in statuses
    }


def _header(type_: Any) -> dict[str, Any]:
    """As an object of OpenAPI; one whose type has None is not always there."""
    told, is_optional = _inlined(type_)
    return {"required": not is_optional, **told}


def _parameter(name: str, place: str, type_: Any) -> dict[str, Any]:
    told, _ = _inlined(type_)
    return {"name": name, "in": place, **told}


def _query_parameter(info: msgspec.structs.FieldInfo) -> dict[str, Any]:
    parameter = _parameter(info.name, "query", info.type)
    if info.default not in (None, msgspec.NODEFAULT):
        parameter["schema"]["default"] = info.default
    return parameter


def _inlined(type_: Any) -> tuple[dict[str, Any], bool]:
    """What a parameter or header of this type is, and whether the type has None: that is how its absence is held here,
    not something to be sent."""
    (found,), components = msgspec.json.schema_components([type_], ref_template="{name}")
    told: dict[str, Any] = {"description": found.pop("description")} if "description" in found else {}
    arms = found.pop("anyOf", [])
    for arm in (arm for arm in arms if arm != {"type": "null"}):
        found = arm | found
    if "$ref" in found:
        found = components[found.pop("$ref")] | found
        del found["title"], found["description"]
    if "examples" in found:
        told["example"] = found.pop("examples")[0]
    return {**told, "schema": found}, {"type": "null"} in arms


def _reference(type_: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{type_.__name__}"}


def _content(schema_: dict[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    told = {name.replace(" ", "-"): {"summary": name, "value": value} for name, value in shown.items()}
    return {JSON: {"schema": schema_, "examples": told}}


def _plain(value: msgspec.Struct) -> Any:
    # A set has no order of its own; the document has one.
    return msgspec.to_builtins(value, order="deterministic")


def _without_defaults(body: msgspec.Struct) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(body)
    least = {
        info.name: info.default if info.default_factory is msgspec.NODEFAULT else info.default_factory()
        for info in msgspec.structs.fields(body)
    }
    return {name: value for name, value in plain.items() if name not in least or value != least[name]}
