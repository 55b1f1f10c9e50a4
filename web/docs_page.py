"""`/docs`: the OpenAPI document as a page to be read and printed, made on the server like the other pages.

Here the document is put into the words and rows that the template shows; what is true of a call is the document's, and
nothing is added to it but how `curl` asks for it and what an error is over gRPC.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import quart
from markupsafe import Markup, escape
from quart import Response
from quart_trio import QuartTrio

from saga.error_codes import ERROR_CODES
from web.exchange import JSON
from web.sign_in import PAGE_HEADERS

Json = Mapping[str, Any]

ON_EVERY_ANSWER = "X-Request-Id"
"""The header that is told of once, in the document's own words."""


class Word(msgspec.Struct, frozen=True):
    """A piece of what a value is; `schema`: the type it names."""

    text: str
    schema: str | None = None


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter, a header, or a field of a type. `place`: where a parameter goes."""

    name: str
    kind: list[Word]
    bounds: str
    description: str
    required: bool
    place: str = ""
    example: str = ""


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """Something sent or answered."""

    title: str
    text: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One status of an operation. `error`: the name of an answer that many have; their examples stand there."""

    status: str
    description: str
    kind: list[Word]
    headers: list[Field]
    examples: list[Example]
    error: str | None = None


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One operation. `next`: operations that take something out of its answer."""

    name: str
    method: str
    path: str
    summary: str
    description: str
    parameters: list[Field]
    body: list[Word]
    is_body_required: bool
    requests: list[Example]
    answers: list[Answer]
    next: list[str]


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Operations about one thing."""

    name: str
    description: str
    calls: list[Call]


class Type(msgspec.Struct, frozen=True, kw_only=True):
    """One type of JSON; `fields` of an object, `kind` of what is none."""

    name: str
    description: str
    kind: list[Word]
    fields: list[Field]
    is_closed: bool


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """The document as it is shown. `codes`: code, HTTP statuses and gRPC statuses of each error."""

    version: str
    about: str
    security: str
    groups: list[Group]
    errors: list[Answer]
    codes: list[tuple[str, str, str]]
    types: list[Type]


def add_docs_page(app: QuartTrio, document: Callable[[], Json]) -> None:
    """Adds `/docs`. `document` gives the OpenAPI document, the same each time."""
    rendered: str | None = None
    app.jinja_env.filters["ticked"] = _ticked

    @app.get("/docs")
    async def docs_page() -> Response:
        nonlocal rendered
        if rendered is None:
            # Once: it is the same for everybody, and anyone may ask for it.
            rendered = await quart.render_template("docs.html", doc=read(document()))
        return Response(rendered, 200, {"Content-Type": "text/html; charset=utf-8", **PAGE_HEADERS})


def read(document: Json) -> Reading:
    """The document in words and rows."""
    components = document["components"]
    calls = [
        (found["tags"], _call(document, method.upper(), path, found))
        for path, item in document["paths"].items()
        for method, found in item.items()
    ]
    statuses = {
        reference["$ref"].rpartition("/")[2]: status
        for item in document["paths"].values()
        for found in item.values()
        for status, reference in found["responses"].items()
        if "$ref" in reference
    }
    codes: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for told in ERROR_CODES.values():
        over_http, over_grpc = codes.setdefault(told.code, ({}, {}))
        over_http[str(told.http_status)] = over_grpc[told.grpc_status] = None
    return Reading(
        version=document["info"]["version"],
        about=document["info"]["description"],
        security=" ".join(scheme["description"] for scheme in components["securitySchemes"].values()),
        groups=[
            Group(
                name=tag["name"], description=tag["description"], calls=[c for tags, c in calls if tag["name"] in tags]
            )
            for tag in document["tags"]
        ],
        errors=[
            _answer(document, statuses[name], {"$ref": f"#/components/responses/{name}"})
            for name in components["responses"]
            if name in statuses
        ],
        codes=[(code, ", ".join(http), ", ".join(grpc)) for code, (http, grpc) in codes.items()],
        types=[_type(name, schema) for name, schema in _all_types(components["schemas"])],
    )


def _call(document: Json, method: str, path: str, found: Json) -> Call:
    parameters = [_followed(document, parameter) for parameter in found["parameters"]]
    content = found.get("requestBody", {}).get("content", {}).get(JSON, {})
    return Call(
        name=found["operationId"],
        method=method,
        path=path,
        summary=found["summary"],
        description=found["description"],
        parameters=[_field(each["name"], each["schema"], each, each.get("required", False)) for each in parameters],
        body=_kind(content["schema"]) if content else [],
        is_body_required=found.get("requestBody", {}).get("required", False),
        requests=list(_requests(method, path, found, parameters, content)),
        answers=[_answer(document, status, answer) for status, answer in found["responses"].items()],
        next=[
            name
            for answer in found["responses"].values()
            for name in answer.get("links", {})
            if name != found["operationId"]
        ],
    )


def _requests(method: str, path: str, found: Json, parameters: Sequence[Json], content: Json) -> Iterator[Example]:
    """How `curl` asks for it, with each example of a body."""
    for parameter in parameters:
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", parameter["example"])
    words = ["curl -s"]
    if found["security"]:
        words.append('-H "Authorization: Bearer $TOKEN"')
    examples = content.get("examples", {})
    if method == "POST" and not examples:
        words.append("-X POST")
    if not examples:
        yield Example(title="", text=" ".join([*words, f'"$SAGA{path}"']))
    for example in examples.values():
        body = msgspec.json.format(msgspec.json.encode(example["value"]), indent=2).decode()
        line = " ".join([*words, "-H 'Content-Type: application/json'", f'"$SAGA{path}"'])
        yield Example(title=example["summary"], text=f"{line} \\\n  -d {shlex.quote(body)}")


def _answer(document: Json, status: str, found: Json) -> Answer:
    answer = _followed(document, found)
    content = answer["content"][JSON]
    return Answer(
        status=status,
        description=answer["description"],
        kind=_kind(content["schema"]),
        headers=[
            _field(name, header["schema"], header, header["required"])
            for name, header in ((name, _followed(document, each)) for name, each in answer["headers"].items())
            if name != ON_EVERY_ANSWER
        ],
        examples=[
            Example(
                title=example["summary"],
                text=msgspec.json.format(msgspec.json.encode(example["value"]), indent=2).decode(),
            )
            for example in content["examples"].values()
        ],
        error=found["$ref"].rpartition("/")[2] if "$ref" in found else None,
    )


def _type(name: str, schema: Json) -> Type:
    fields = schema.get("properties", {})
    return Type(
        name=name,
        description=schema.get("description", ""),
        kind=[] if fields else _kind(schema),
        fields=[_field(each, fields[each], fields[each], each in schema["required"]) for each in fields],
        is_closed=schema.get("additionalProperties") is False,
    )


def _all_types(schemas: Json) -> Iterator[tuple[str, Json]]:
    """The types by name, those that stand inside another behind it; those of errors last."""
    for name, schema in sorted(schemas.items(), key=lambda item: item[0].startswith("Error")):
        yield name, schema
        for field in schema.get("properties", {}).values():
            inner = field.get("additionalProperties")
            if isinstance(inner, dict) and "title" in inner:
                yield inner["title"], inner


def _field(name: str, schema: Json, told: Json, required: bool) -> Field:
    return Field(
        name=name,
        kind=_kind(schema),
        bounds=_bounds(schema),
        description=told.get("description", ""),
        required=required,
        place=told.get("in", ""),
        example=str(told.get("example", *schema.get("examples", [""])[:1])),
    )


def _kind(schema: Json) -> list[Word]:
    """What a value is, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return [Word(name, name)]
    if "anyOf" in schema:
        words: list[Word] = []
        for arm in schema["anyOf"]:
            words += [*([Word(" or ")] if words else []), *_kind(arm)]
        return words
    if "enum" in schema:
        return [Word(" | ".join(msgspec.json.encode(value).decode() for value in schema["enum"]))]
    if schema.get("type") == "array":
        return [Word("array of "), *_kind(schema["items"])]
    inner = schema.get("additionalProperties")
    if isinstance(inner, dict) and inner:
        return [Word("object of "), *([Word(inner["title"], inner["title"])] if "title" in inner else _kind(inner))]
    kind = schema.get("type", "any JSON")
    return [Word(f"{kind} ({schema['format']})" if "format" in schema else kind)]


def _bounds(schema: Json) -> str:
    """Its limits and default, in words."""
    found = [
        _range(schema, "minLength", "maxLength", " characters"),
        _range(schema, "minimum", "maximum", ""),
        f"default {msgspec.json.encode(schema['default']).decode()}" if schema.get("default") is not None else "",
    ]
    return ", ".join(each for each in found if each)


def _range(schema: Json, low: str, high: str, of: str) -> str:
    if low in schema and high in schema:
        return f"{schema[low]:.15g} to {schema[high]:.15g}{of}"
    if high in schema:
        return f"at most {schema[high]:.15g}{of}"
    return f"at least {schema[low]:.15g}{of}" if low in schema else ""


def _followed(document: Json, found: Json) -> Json:
    """What is meant by what may be a reference."""
    while "$ref" in found:
        _, kind, name = found["$ref"].removeprefix("#/").split("/")
        found = document["components"][kind][name]
    return found


def _ticked(text: str) -> Markup:
    """The text with what stands between backticks as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part)
        for number, part in enumerate(text.split("`"))
    )
