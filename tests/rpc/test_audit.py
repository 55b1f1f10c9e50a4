"""The audit log at the gRPC door, with real tokens."""

from __future__ import annotations

import json

import pytest
from google.protobuf.message import Message
from grpclib.const import Status
from k1s0.system.common.v1.types_pb2 import Timestamp
from k1s0.system.saga.v1 import saga_pb2 as pb
from multidict import MultiDict

from tests.rpc.conftest import NO_SAGA, Door, fields, open_door
from tests.support.issuer import Issuer, token_of
from tests.support.orchestrator import HANGS, ORDER
from tests.support.verifier import verifier


def as_(subject: str, *roles: str) -> MultiDict[str]:
    token = token_of(*roles, sub=subject)
    return MultiDict([("authorization", f"Bearer {token}"), ("x-request-id", f"of-{subject}")])


async def audited(door: Door, **query: str) -> list[pb.AuditEntryProto]:
    """Without the workflow that the house begins with."""
    answer = await door.ask(door.stub.ListAudit, pb.ListAuditRequest(**query), metadata=as_("eve", "sys_auditor"))  # type: ignore[arg-type]  # texts only
    return [entry for entry in answer.entries if entry.door != "PROCESS"]


async def test_every_change_is_told_with_who_asked_for_it(idp: Issuer) -> None:
    async with verifier(idp) as access, open_door(authenticator=access) as door:
        door.house.answers["Inventory.Reserve"] = [HANGS]
        alice = as_("alice", "sys_operator")
        request: Message = pb.StartSagaRequest(workflow_name="order")
        saga_id = (await door.ask(door.stub.StartSaga, request, metadata=alice)).saga_id
        request = pb.CancelSagaRequest(saga_id=saga_id, reason="by phone")
        await door.ask(door.stub.CancelSaga, request, metadata=alice)
        changed = pb.RegisterWorkflowRequest(workflow_yaml=ORDER.replace("max_attempts: 1", "max_attempts: 2"))
        await door.ask(door.stub.RegisterWorkflow, changed, metadata=alice)
        entries = await audited(door)
        assert [(entry.action, entry.outcome, entry.principal, list(entry.roles)) for entry in entries] == [
            ("REGISTER_WORKFLOW", "DONE", "alice", ["sys_operator"]),
            ("CANCEL_SAGA", "DONE", "alice", ["sys_operator"]),
            ("START_SAGA", "DONE", "alice", ["sys_operator"]),
        ]
        registered, cancelled, _ = entries
        assert (registered.workflow_name, registered.workflow_version, registered.saga_id) == ("order", 2, "")
        assert (cancelled.door, cancelled.address, cancelled.request_id) == ("GRPC", "127.0.0.1", "of-alice")
        assert (cancelled.saga_id, cancelled.reason) == (saga_id, "by phone")
        assert json.loads(cancelled.after)["cancel_requested"] is True
        assert [entry.action for entry in await audited(door, saga_id=saga_id)] == ["CANCEL_SAGA", "START_SAGA"]
        assert await audited(door, principal="bob") == []
        door.house.let_go.set()


@pytest.mark.parametrize(
    ("method", "request_", "action"),
    [
        ("StartSaga", pb.StartSagaRequest(workflow_name="order"), "START_SAGA"),
        ("CancelSaga", pb.CancelSagaRequest(saga_id=NO_SAGA), "CANCEL_SAGA"),
        ("RetryCompensation", pb.RetryCompensationRequest(saga_id=NO_SAGA), "RETRY_COMPENSATION"),
        ("RegisterWorkflow", pb.RegisterWorkflowRequest(workflow_yaml=ORDER), "REGISTER_WORKFLOW"),
    ],
)
async def test_a_change_that_was_denied_is_told_too(idp: Issuer, method: str, request_: Message, action: str) -> None:
    async with verifier(idp) as access, open_door(authenticator=access) as door:
        eve = as_("eve", "sys_auditor")
        error = await door.refused(getattr(door.stub, method), request_, metadata=eve)
        assert error.status is Status.PERMISSION_DENIED
        (entry,) = await audited(door)
        assert (entry.action, entry.outcome, entry.principal) == (action, "DENIED", "eve")


async def test_the_log_is_continued_by_a_cursor() -> None:
    async with open_door() as door:
        request = pb.StartSagaRequest(workflow_name="order")
        ids = [(await door.ask(door.stub.StartSaga, request)).saga_id for _ in range(3)]
        page = await door.ask(door.stub.ListAudit, pb.ListAuditRequest(action="START_SAGA", page_size=2))
        rest = await door.ask(
            door.stub.ListAudit, pb.ListAuditRequest(action="START_SAGA", page_size=2, cursor=page.next_cursor)
        )
        assert [entry.saga_id for entry in (*page.entries, *rest.entries)] == ids[::-1]
        assert rest.next_cursor == ""


async def test_a_request_that_cannot_be_is_refused() -> None:
    async with open_door() as door:
        for request, field in (
            (pb.ListAuditRequest(action="DROP"), "action"),
            (pb.ListAuditRequest(page_size=-1), "page_size"),
            (pb.ListAuditRequest(page_size=201), "page_size"),
            (pb.ListAuditRequest(saga_id="x"), "saga_id"),
            (pb.ListAuditRequest(cursor="x"), "cursor"),
            (pb.ListAuditRequest(created_after=Timestamp(seconds=1 << 60)), "created_after"),
        ):
            error = await door.refused(door.stub.ListAudit, request)
            assert error.status is Status.INVALID_ARGUMENT
            assert fields(error) == [field]
