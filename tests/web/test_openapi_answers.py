"""The OpenAPI document against a running server: each operation is brought to each answer it declares, and every answer
has the status, the body and the headers that the document says."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from saga.access import Permission
from saga.door_limits import MAX_HEADERS, DoorLimits
from saga.errors import Unavailable
from saga.readiness import Readiness
from saga.workflow_yaml import MAX_YAML_BYTES
from tests.support.issuer import Issuer, token_of
from tests.support.orchestrator import HANGS, ORDER, REFUSED
from tests.support.verifier import verifier
from tests.web.conftest import Site, open_site
from tests.web.test_openapi import BY_NAME, OPERATIONS, described, faults, followed
from web.api import Operation
from web.exchange import JSON

NO_SAGA = "00000000-0000-4000-8000-000000000000"
BODIES = {
    "startSaga": {"workflow_name": "order"},
    "retryCompensation": {"steps": {}},
    "registerWorkflow": {"workflow_yaml": ORDER},
}
SOMETIMES = {"line", "column"}
"""Of a fault in a workflow's YAML, and of no other."""
TOO_MUCH = 2 * MAX_YAML_BYTES + 64 * 1024 + 1


class Inspector:
    """Asks for operations by name, looks at every answer, and remembers which came."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.seen: set[tuple[str, int]] = set()

    async def ask(
        self,
        name: str,
        expected: int,
        *,
        saga_id: str = NO_SAGA,
        workflow: str = "order",
        role: str | None = "sys_admin",
        headers: list[tuple[str, str]] | None = None,
        **more: Any,
    ) -> httpx.Response:
        operation = BY_NAME[name]
        if "content" not in more and name in BODIES:
            more.setdefault("json", BODIES[name])
        sent = [*(headers or []), *([("Authorization", f"Bearer {token_of(role)}")] if role is not None else [])]
        answer = await self.site.client.request(
            operation.method,
            operation.path.replace("{saga_id}", saga_id).replace("{name}", workflow),
            headers=sent,
            **more,
        )
        assert answer.status_code == expected, (name, answer.text)
        assert wrong(operation, answer) == [], (name, answer.status_code, answer.text)
        self.seen.add((name, expected))
        return answer


def wrong(operation: Operation, answer: httpx.Response) -> list[str]:
    """In what an answer is not as the document says."""
    declared = described(operation)["responses"].get(str(answer.status_code))
    if declared is None:
        return [f"status {answer.status_code} is not declared"]
    declared = followed(declared)
    content = declared["content"].get(answer.headers["Content-Type"])
    if content is None:
        return [f"Content-Type {answer.headers['Content-Type']} is not declared"]
    found = faults(content["schema"], answer.json()) + unpromised(content["schema"], answer.json())
    for name, header in declared["headers"].items():
        header, value = followed(header), answer.headers.get(name)
        if value is None:
            found += [f"header {name} is missing"] if header["required"] else []
        else:
            found += faults(header["schema"], int(value) if header["schema"].get("type") == "integer" else value)
    told = {"retry-after", "www-authenticate", "location", "idempotent-replayed", "allow"} & set(answer.headers.keys())
    return found + [f"header {name} is not declared" for name in told - {name.lower() for name in declared["headers"]}]


def unpromised(schema: dict[str, Any], value: object) -> list[str]:
    """Fields of an answer that the document does not say to be always there, at whatever depth."""
    schema = followed(schema)
    if "anyOf" in schema:
        schema = followed(next(arm for arm in schema["anyOf"] if not faults(arm, value)))
    if isinstance(value, list):
        return [name for inner in value for name in unpromised(schema.get("items", {}), inner)]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    found = [f"{name} is not required" for name in value if name not in {*schema["required"], *SOMETIMES}]
    return found + [name for key, inner in value.items() for name in unpromised(schema["properties"][key], inner)]


async def bring_to_its_successes(inspector: Inspector) -> None:
    """Every operation, on sagas that have come as far as it needs; and the conflicts on the way."""
    ask, answers = inspector.ask, inspector.site.house.answers
    answers |= {"Payment.Charge": [REFUSED], "Inventory.Release": [REFUSED]}
    key = [("Idempotency-Key", "k")]
    saga_id = (await ask("startSaga", 201, headers=key)).json()["saga_id"]
    replayed = await ask("startSaga", 201, headers=key)
    assert (replayed.json()["saga_id"], replayed.headers["Idempotent-Replayed"]) == (saga_id, "true")
    await ask("startSaga", 409, headers=key, json={"workflow_name": "order", "payload": {"other": 1}})
    ended = await ask("getSaga", 200, saga_id=saga_id, params={"wait_secs": 10})
    assert ended.json()["saga"]["compensation_failed"]
    for name in ("cancelSaga", "compensateSaga"):
        await ask(name, 409, saga_id=saga_id)
    del answers["Inventory.Release"]
    await ask("retryCompensation", 202, saga_id=saga_id)
    await ask("getSaga", 200, saga_id=saga_id, params={"wait_secs": 10})
    await ask("retryCompensation", 409, saga_id=saga_id)
    answers["Inventory.Reserve"] = [HANGS]
    for name in ("cancelSaga", "compensateSaga"):
        running = (await ask("startSaga", 201)).json()["saga_id"]
        await ask(name, 200, saga_id=running)
    await ask("registerWorkflow", 201)
    for name in ("listSagas", "listWorkflows", "getWorkflow", "listAudit", "healthz", "readyz"):
        await ask(name, 200)


async def refuse_everywhere(inspector: Inspector) -> None:
    """Every operation, by what its caller does wrong."""
    ask = inspector.ask
    for operation in OPERATIONS:
        await ask(operation.name, 413, content=b"x" * TOO_MUCH)
        await ask(operation.name, 400, headers=[(f"X-{number}", "") for number in range(MAX_HEADERS)])
        if operation.permission is not Permission.OPEN:
            await ask(operation.name, 400, params={"unheard_of": "1"})
            await ask(operation.name, 401, role=None)
            await ask(operation.name, 403, role="sys_auditor" if operation.method == "POST" else "nobody in particular")
        if "{saga_id}" in operation.path:
            await ask(operation.name, 404)
    await ask("getWorkflow", 404, workflow="nope")
    await ask("startSaga", 404, json={"workflow_name": "nope"})
    await ask("startSaga", 400, json={"workflow_name": "", "payload": 1, "sku": "lamp"})
    faulty = await ask("registerWorkflow", 400, json={"workflow_yaml": "name: order\nsteps: [{name: a}]"})
    assert {"line", "column"} < faulty.json()["error"]["details"][0].keys()


async def break_everywhere(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    """Every operation, by what it cannot do without."""

    async def fails(*_: object, **__: object) -> None:
        raise error

    def fails_at_once(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        service = inspector.site.house.service
        for name in ("start", "list_sagas", "get", "cancel", "retry_compensation"):
            patched.setattr(service, name, fails)
        for name in ("register_workflow", "workflows", "workflow"):
            patched.setattr(service, name, fails)
        patched.setattr(service.audit, "entries", fails)
        patched.setattr(Readiness, "report", fails)
        patched.setattr("web.api.schema.Alive", fails_at_once)
        for operation in OPERATIONS:
            await inspector.ask(operation.name, status)


async def test_every_answer_of_every_operation_is_as_the_document_says(
    idp: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with verifier(idp) as access, open_site(1000, authenticator=access) as site:
        inspector = Inspector(site)
        await bring_to_its_successes(inspector)
        await refuse_everywhere(inspector)
        await break_everywhere(inspector, monkeypatch, ZeroDivisionError("ours"), 500)
        await break_everywhere(inspector, monkeypatch, Unavailable("the database cannot be reached"), 503)

        async def away() -> None:
            raise Unavailable("no route")

        monkeypatch.setattr(site.house.store, "ping", away)
        assert (await inspector.ask("readyz", 503)).json()["status"] == "unhealthy"
    declared = {(each.name, int(status)) for each in OPERATIONS for status in described(each)["responses"]}
    assert inspector.seen == declared


async def test_what_the_door_has_no_room_for_is_answered_as_the_document_says() -> None:
    async with open_site(limits=DoorLimits(max_requests=0)) as site:
        inspector = Inspector(site)
        for operation in OPERATIONS:
            await inspector.ask(operation.name, 200 if operation.permission is Permission.OPEN else 503)


def test_an_answer_that_is_not_as_the_document_says_is_found_out() -> None:
    started = {"saga_id": NO_SAGA, "status": "STARTED"}
    told = {"Content-Type": JSON, "X-Request-Id": "r", "Location": "/"}

    def found(status: int = 201, headers: dict[str, str] = told, body: object = started) -> list[str]:
        return wrong(BY_NAME["startSaga"], httpx.Response(status, headers=headers, content=msgspec.json.encode(body)))

    assert found() == []
    assert found(status=202) == ["status 202 is not declared"]
    assert found(headers={**told, "Content-Type": "text/html"}) == ["Content-Type text/html is not declared"]
    assert found(headers={**told, "Retry-After": "1"}) == ["header retry-after is not declared"]
    assert found(headers={"Content-Type": JSON, "X-Request-Id": "r"}) == ["header Location is missing"]
    assert found(body={"saga_id": NO_SAGA}) != []
    assert found(body={**started, "status": "DONE"}) != []
    loose = {"properties": {"a": {}, "b": {"items": {"properties": {"c": {}}, "required": []}}}, "required": ["b"]}
    assert unpromised(loose, {"a": 1, "b": [{"c": 1}]}) == ["a is not required", "c is not required"]
