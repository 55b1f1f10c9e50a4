"""The gRPC door, asked by a grpclib client over a real connection: each method."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from grpclib.const import Status
from k1s0.system.common.v1.types_pb2 import Pagination, Timestamp
from k1s0.system.saga.v1 import saga_pb2 as pb
from multidict import MultiDict

from bridge import call_trio, run_aio
from saga.errors import Unavailable
from tests.rpc.conftest import NO_SAGA, Door, fields, reason
from tests.support.orchestrator import HANGS, ORDER, REFUSED

CALLERS_TRACE = "0af7651916cd43dd8448eb211c80319c"


async def test_a_saga_is_started_and_read_with_every_field_of_its_state_and_logs(door: Door) -> None:
    saga_id = await door.start(payload=b'{"order_id": "o-1"}', correlation_id="c-1", initiated_by="shop")
    detail = await door.ended(saga_id)
    state = detail.saga
    assert (state.id, state.workflow_name, state.workflow_version) == (saga_id, "order", 1)
    assert (state.status, state.current_step, json.loads(state.payload)) == ("COMPLETED", 2, {"order_id": "o-1"})
    assert (state.correlation_id, state.initiated_by, state.error_message) == ("c-1", "shop", "")
    assert (state.compensation_failed, state.attempt, state.HasField("next_attempt_at")) == (False, 0, False)
    assert 0 < state.created_at.seconds <= state.updated_at.seconds
    assert [(log.step_index, log.step_name, log.action, log.status) for log in detail.step_logs] == [
        (0, "reserve", "EXECUTE", "SUCCESS"),
        (1, "charge", "EXECUTE", "SUCCESS"),
    ]
    log = detail.step_logs[0]
    assert log.id
    assert (log.saga_id, log.attempts, log.error_message) == (saga_id, 1, "")
    assert json.loads(log.request_payload) == {"order_id": "o-1"}
    assert json.loads(log.response_payload) == {"ok": True}
    assert log.started_at.seconds <= log.completed_at.seconds


async def test_start_answers_started_and_an_empty_payload_is_an_empty_object(door: Door) -> None:
    answer = await door.ask(door.stub.StartSaga, pb.StartSagaRequest(workflow_name="order"))
    assert (answer.status, answer.replayed) == ("STARTED", False)
    assert (await door.ended(answer.saga_id)).saga.payload == b"{}"


@pytest.mark.parametrize(
    "payload", [b"[]", b"1", b"null", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'"' + b"x" * 9]
)
async def test_a_payload_that_is_no_json_object_is_refused_by_its_field(door: Door, payload: bytes) -> None:
    error = await door.refused(door.stub.StartSaga, pb.StartSagaRequest(workflow_name="order", payload=payload))
    assert (error.status, reason(error)) == (Status.INVALID_ARGUMENT, "SYS_SAGA_VALIDATION_ERROR")
    assert fields(error) == ["payload"]
    assert await door.start()


async def test_a_payload_nested_too_deep_is_refused_by_its_field(door: Door) -> None:
    payload = b'{"a":' * 100 + b"{}" + b"}" * 100
    error = await door.refused(door.stub.StartSaga, pb.StartSagaRequest(workflow_name="order", payload=payload))
    assert (error.status, fields(error)) == (Status.INVALID_ARGUMENT, ["payload"])
    assert await door.start(payload=b'{"a":' * 99 + b"{}" + b"}" * 99)


async def test_a_number_that_is_too_large_is_named_by_its_place(door: Door) -> None:
    request = pb.StartSagaRequest(workflow_name="order", payload=b'{"items": [{"price": 1e999}]}')
    error = await door.refused(door.stub.StartSaga, request)
    assert (error.status, fields(error)) == (Status.INVALID_ARGUMENT, ["payload.items[0].price"])


async def test_every_field_at_fault_is_named(door: Door) -> None:
    request = pb.StartSagaRequest(workflow_name="", correlation_id="x" * 256, initiated_by="a\nb")
    error = await door.refused(door.stub.StartSaga, request)
    assert error.status is Status.INVALID_ARGUMENT
    assert fields(error) == ["workflow_name", "correlation_id", "initiated_by"]


async def test_unknown_workflow_is_not_found(door: Door) -> None:
    error = await door.refused(door.stub.StartSaga, pb.StartSagaRequest(workflow_name="nope"))
    assert (error.status, reason(error)) == (Status.NOT_FOUND, "SYS_SAGA_NOT_FOUND")
    assert error.message == "workflow not found: nope"


@pytest.mark.parametrize("saga_id", [NO_SAGA, "", "no id", "\u0000", "x" * 10_000])
async def test_unknown_saga_is_not_found_whatever_is_asked_of_it(door: Door, saga_id: str) -> None:
    for error in (
        await door.refused(door.stub.GetSaga, pb.GetSagaRequest(saga_id=saga_id)),
        await door.refused(door.stub.CancelSaga, pb.CancelSagaRequest(saga_id=saga_id)),
        await door.refused(door.stub.RetryCompensation, pb.RetryCompensationRequest(saga_id=saga_id)),
        await door.refused(door.stub.WatchSaga, pb.WatchSagaRequest(saga_id=saga_id)),
    ):
        assert (error.status, reason(error)) == (Status.NOT_FOUND, "SYS_SAGA_NOT_FOUND")


async def test_an_idempotency_key_gives_the_same_saga_and_another_request_under_it_is_refused(door: Door) -> None:
    request = pb.StartSagaRequest(workflow_name="order", payload=b'{"n": 1}')
    key = {"idempotency-key": "k-1"}
    first = await door.ask(door.stub.StartSaga, request, metadata=key)
    await door.ended(first.saga_id)
    second = await door.ask(door.stub.StartSaga, request, metadata=key)
    assert (second.saga_id, second.status, second.replayed) == (first.saga_id, "STARTED", True)
    other = pb.StartSagaRequest(workflow_name="order", payload=b'{"n": 2}')
    error = await door.refused(door.stub.StartSaga, other, metadata=key)
    assert (error.status, reason(error)) == (Status.FAILED_PRECONDITION, "SYS_SAGA_CONFLICT")
    too_long = await door.refused(door.stub.StartSaga, request, metadata={"idempotency-key": "k" * 256})
    twice = await door.refused(door.stub.StartSaga, request, metadata=[*key.items(), ("idempotency-key", "k-2")])
    for refusal in (too_long, twice):
        assert (refusal.status, fields(refusal)) == (Status.INVALID_ARGUMENT, ["Idempotency-Key"])


async def test_traceparent_is_handed_to_the_participants(door: Door) -> None:
    sent = {"traceparent": f"00-{CALLERS_TRACE}-b7ad6b7169203331-01"}
    answer = await door.ask(door.stub.StartSaga, pb.StartSagaRequest(workflow_name="order"), metadata=sent)
    await door.ended(answer.saga_id)
    assert {call.traceparent.split("-")[1] for call in door.house.calls} == {CALLERS_TRACE}


@pytest.mark.parametrize(
    "sent",
    [
        [f"00-{CALLERS_TRACE}-b7ad6b7169203331-01", f"00-{CALLERS_TRACE}-b7ad6b7169203332-01"],
        [f"00-{CALLERS_TRACE}-b7ad6b7169203331-01"] * 2,
        [f"00-{CALLERS_TRACE}-0000000000000000-01"],
        [CALLERS_TRACE],
        ["x" * 10_000],
    ],
    ids=["two", "the same twice", "no span", "no form", "long"],
)
async def test_a_traceparent_that_says_nothing_clear_does_not_count_and_the_saga_is_started_all_the_same(
    door: Door, sent: list[str]
) -> None:
    metadata = MultiDict(("traceparent", value) for value in sent)
    request = pb.StartSagaRequest(workflow_name="order")
    answer = await door.ask(door.stub.StartSaga, request, metadata=metadata)
    await door.ended(answer.saga_id)
    assert {call.traceparent.split("-")[1] for call in door.house.calls} == {answer.saga_id.replace("-", "")}


async def test_a_cancel_holds_and_a_terminal_saga_cannot_be_cancelled(door: Door) -> None:
    door.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await door.start()
    answer = await door.ask(door.stub.CancelSaga, pb.CancelSagaRequest(saga_id=saga_id))
    assert (answer.success, answer.message) == (True, f"saga {saga_id} cancelled")
    assert (await door.ended(saga_id)).saga.status == "CANCELLED"
    error = await door.refused(door.stub.CancelSaga, pb.CancelSagaRequest(saga_id=saga_id))
    assert (error.status, reason(error)) == (Status.FAILED_PRECONDITION, "SYS_SAGA_CONFLICT")


async def test_failed_compensations_can_be_found_and_run_again(door: Door) -> None:
    door.house.answers["Payment.Charge"] = [REFUSED]
    door.house.answers["Inventory.Release"] = [REFUSED]
    saga_id = await door.start()
    failed = (await door.ended(saga_id)).saga
    assert (failed.status, failed.compensation_failed) == ("FAILED", True)
    listed = await door.ask(door.stub.ListSagas, pb.ListSagasRequest(compensation_failed=True))
    assert [saga.id for saga in listed.sagas] == [saga_id]
    others = await door.ask(door.stub.ListSagas, pb.ListSagasRequest(compensation_failed=False))
    assert list(others.sagas) == []
    del door.house.answers["Inventory.Release"]
    again = await door.ask(door.stub.RetryCompensation, pb.RetryCompensationRequest(saga_id=saga_id))
    assert (again.saga_id, again.status) == (saga_id, "COMPENSATING")
    done = (await door.ended(saga_id)).saga
    assert (done.status, done.compensation_failed) == ("FAILED", False)
    error = await door.refused(door.stub.RetryCompensation, pb.RetryCompensationRequest(saga_id=saga_id))
    assert (error.status, reason(error)) == (Status.FAILED_PRECONDITION, "SYS_SAGA_CONFLICT")


async def failed_undo(door: Door) -> str:
    """A saga whose only undo, that of `reserve`, has failed; the next one works."""
    door.house.answers.update({"Payment.Charge": [REFUSED], "Inventory.Release": [REFUSED]})
    saga_id = await door.start()
    assert (await door.ended(saga_id)).saga.compensation_failed
    del door.house.answers["Inventory.Release"]
    door.house.calls.clear()
    return saga_id


async def test_a_failed_undo_is_run_again_with_a_corrected_request(door: Door) -> None:
    saga_id = await failed_undo(door)
    correction = pb.CompensationCorrection(input=b'{"receipt_id": "r-7"}', reason="typo")
    request = pb.RetryCompensationRequest(saga_id=saga_id, steps={"reserve": correction})
    assert (await door.ask(door.stub.RetryCompensation, request)).status == "COMPENSATING"
    log = (await door.ended(saga_id)).step_logs[-1]
    assert (log.step_name, log.status, log.attempts) == ("reserve", "SUCCESS", 1)
    assert (log.request_payload, log.error_message) == (b'{"receipt_id":"r-7"}', "request corrected: typo")
    assert [call.request for call in door.house.calls] == [{"receipt_id": "r-7"}]


async def test_a_failed_undo_that_was_done_by_hand_is_logged_with_its_reason(door: Door) -> None:
    saga_id = await failed_undo(door)
    steps = {"reserve": pb.CompensationCorrection(mark_done=True, reason="freed by hand")}
    answer = await door.ask(door.stub.RetryCompensation, pb.RetryCompensationRequest(saga_id=saga_id, steps=steps))
    assert answer.status == "FAILED"
    detail = await door.ended(saga_id)
    assert not detail.saga.compensation_failed
    log = detail.step_logs[-1]
    assert (log.action, log.status, log.attempts) == ("COMPENSATE", "SUCCESS", 0)
    assert (log.request_payload, log.error_message) == (b"", "done by hand: freed by hand")
    assert door.house.calls == []


async def test_every_fault_of_a_correction_is_told_by_its_path(door: Door) -> None:
    saga_id = await failed_undo(door)
    steps = {
        "reserve": pb.CompensationCorrection(input=b"[]", mark_done=True),
        "charge": pb.CompensationCorrection(input=b""),
        "nope": pb.CompensationCorrection(),
    }
    error = await door.refused(door.stub.RetryCompensation, pb.RetryCompensationRequest(saga_id=saga_id, steps=steps))
    assert (error.status, reason(error)) == (Status.INVALID_ARGUMENT, "SYS_SAGA_VALIDATION_ERROR")
    assert set(fields(error)) == {
        *("steps.reserve", "steps.reserve.input", "steps.reserve.reason"),
        *("steps.charge", "steps.nope"),
    }
    for broken in (b"{", b"\xff", b"[" * 100_000):
        broken_steps = {"reserve": pb.CompensationCorrection(input=broken)}
        request = pb.RetryCompensationRequest(saga_id=saga_id, steps=broken_steps)
        assert fields(await door.refused(door.stub.RetryCompensation, request)) == ["steps.reserve.input"]


async def test_a_list_without_pagination_is_page_1_of_20_newest_first(door: Door) -> None:
    ids = [await door.start() for _ in range(21)]
    page = await door.ask(door.stub.ListSagas, pb.ListSagasRequest())
    assert [saga.id for saga in page.sagas] == ids[:0:-1]
    result = page.pagination
    assert (result.total_count, result.page, result.page_size, result.has_next) == (21, 1, 20, True)
    rest = await door.ask(door.stub.ListSagas, pb.ListSagasRequest(cursor=result.next_cursor))
    assert [saga.id for saga in rest.sagas] == ids[:1]
    assert (rest.pagination.has_next, rest.pagination.next_cursor) == (False, "")
    second = await door.ask(door.stub.ListSagas, pb.ListSagasRequest(pagination=Pagination(page=3, page_size=10)))
    assert [saga.id for saga in second.sagas] == ids[:1]
    assert (second.pagination.page, second.pagination.page_size) == (3, 10)


async def test_a_list_is_filtered_by_each_field(door: Door) -> None:
    one = await door.start(correlation_id="c-1")
    await door.start(correlation_id="c-2")
    created = (await door.ended(one)).saga.created_at

    async def count(**where: Any) -> int:
        page = await door.ask(door.stub.ListSagas, pb.ListSagasRequest(**where))
        return int(page.pagination.total_count)

    assert await count(correlation_id="c-1") == 1
    assert await count(workflow_name="order") == 2
    assert await count(workflow_name="other") == 0
    assert await count(status="COMPLETED", correlation_id="c-1") == 1
    assert await count(status="FAILED") == 0
    assert await count(created_after=created) == 2
    assert await count(created_before=created) == 0
    assert await count(created_after=Timestamp(seconds=created.seconds + 3600)) == 0


@pytest.mark.parametrize(
    ("request_fields", "at_fault"),
    [
        ({"status": "DONE"}, ["status"]),
        ({"status": "running"}, ["status"]),
        ({"pagination": Pagination(page=-1)}, ["page"]),
        ({"pagination": Pagination(page_size=201)}, ["page_size"]),
        ({"pagination": Pagination(page=-1, page_size=-1)}, ["page", "page_size"]),
        ({"cursor": "x"}, ["cursor"]),
        ({"created_after": Timestamp(seconds=1 << 60)}, ["created_after"]),
        ({"created_after": Timestamp(nanos=-1), "created_before": Timestamp(seconds=-(1 << 60))}, 2),
        ({"workflow_name": "a\u0000"}, ["workflow_name"]),
        ({"correlation_id": "a\u0000"}, ["correlation_id"]),
    ],
)
async def test_a_list_request_that_breaks_a_rule_is_refused_by_its_field(
    door: Door, request_fields: dict[str, Any], at_fault: list[str] | int
) -> None:
    error = await door.refused(door.stub.ListSagas, pb.ListSagasRequest(**request_fields))
    assert (error.status, reason(error)) == (Status.INVALID_ARGUMENT, "SYS_SAGA_VALIDATION_ERROR")
    assert fields(error) == at_fault or len(fields(error)) == at_fault


async def test_an_error_that_ends_with_what_the_client_sent_can_be_read_by_a_strict_client(door: Door) -> None:
    # grpclib's own client is one: it refuses headers with blanks at their ends.
    error = await door.refused(door.stub.GetSaga, pb.GetSagaRequest(saga_id=" "))
    assert (error.status, error.message) == (Status.NOT_FOUND, "saga not found:")


@pytest.mark.parametrize("wait_secs", [-1, 60.5, float("nan"), float("inf")])
async def test_a_wait_out_of_range_is_refused_by_its_field(door: Door, wait_secs: float) -> None:
    error = await door.refused(door.stub.GetSaga, pb.GetSagaRequest(saga_id=NO_SAGA, wait_secs=wait_secs))
    assert (error.status, fields(error)) == (Status.INVALID_ARGUMENT, ["wait_secs"])


async def test_a_workflow_is_registered_once_a_version_and_can_be_read(door: Door) -> None:
    same = await door.ask(door.stub.RegisterWorkflow, pb.RegisterWorkflowRequest(workflow_yaml=ORDER))
    assert (same.name, same.version, same.step_count) == ("order", 1, 2)
    changed = ORDER.replace("max_attempts: 1", "max_attempts: 2")
    assert (await door.ask(door.stub.RegisterWorkflow, pb.RegisterWorkflowRequest(workflow_yaml=changed))).version == 2
    (summary,) = (await door.ask(door.stub.ListWorkflows, pb.ListWorkflowsRequest())).workflows
    assert (summary.name, summary.version, summary.step_count) == ("order", 2, 2)
    assert list(summary.step_names) == ["reserve", "charge"]
    read = await door.ask(door.stub.GetWorkflow, pb.GetWorkflowRequest(name="order"))
    assert read.workflow == summary
    assert json.loads(read.definition)["steps"][1]["retry"]["max_attempts"] == 2


async def test_a_bad_workflow_is_refused_with_the_path_of_every_field(door: Door) -> None:
    text = "name: x\nsteps:\n  - name: a\n    service: inventory\n    method: nope\n    retry: {max_attempts: 0}\n"
    error = await door.refused(door.stub.RegisterWorkflow, pb.RegisterWorkflowRequest(workflow_yaml=text))
    assert (error.status, reason(error)) == (Status.INVALID_ARGUMENT, "SYS_SAGA_VALIDATION_ERROR")
    assert set(fields(error)) == {"steps[0].method", "steps[0].retry.max_attempts"}


@pytest.mark.parametrize("name", ["nope", "", "a\u0000"])
async def test_an_unknown_workflow_cannot_be_read(door: Door, name: str) -> None:
    error = await door.refused(door.stub.GetWorkflow, pb.GetWorkflowRequest(name=name))
    assert (error.status, reason(error)) == (Status.NOT_FOUND, "SYS_SAGA_NOT_FOUND")


async def test_a_watch_tells_each_state_and_ends_after_the_final_one(door: Door) -> None:
    door.house.answers["Inventory.Reserve"] = [HANGS]
    door.house.answers["Payment.Charge"] = [REFUSED]
    saga_id = await door.start()
    seen: list[str] = []
    began = trio.Event()

    async def watch() -> None:
        async with door.stub.WatchSaga.open(timeout=10) as stream:
            await stream.send_message(pb.WatchSagaRequest(saga_id=saga_id), end=True)
            async for message in stream:
                seen.append(message.saga.status)
                began.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_aio, watch())
        await began.wait()
        del door.house.answers["Inventory.Reserve"][:]
        door.house.answers["Inventory.Reserve"] = [REFUSED]
        door.house.let_go.set()
    assert seen[0] == "RUNNING"
    assert seen[-1] == "FAILED"


async def test_a_watch_of_an_ended_saga_tells_its_state_and_ends(door: Door) -> None:
    saga_id = await door.start()
    await door.ended(saga_id)
    (message,) = await door.ask(door.stub.WatchSaga, pb.WatchSagaRequest(saga_id=saga_id))
    assert (message.saga.id, message.saga.status) == (saga_id, "COMPLETED")


async def test_a_watcher_that_leaves_is_forgotten(door: Door) -> None:
    door.house.answers["Payment.Charge"] = [HANGS]
    saga_id = await door.start()

    async def look_once() -> None:
        async with door.stub.WatchSaga.open() as stream:
            await stream.send_message(pb.WatchSagaRequest(saga_id=saga_id), end=True)
            await stream.recv_message()
            await stream.cancel()

    await run_aio(look_once())
    await run_aio(door.channel.__aexit__(None, None, None))
    watchers = door.house.service._watchers
    with trio.fail_after(5):
        while len(watchers):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("failure", "ours"),
    [(None, []), (Unavailable("the store is away"), []), (ZeroDivisionError("a bug"), ["grpc_error"])],
    ids=["answered", "refused", "failed"],
)
async def test_a_client_that_leaves_as_its_answer_comes_is_no_error_of_ours_and_hides_none(
    door: Door,
    failure: Exception | None,
    ours: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    reached = trio.Event()

    async def until_it_leaves() -> Any:
        reached.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            if failure is not None:
                raise failure from None
            return []

    monkeypatch.setattr(door.house.store, "workflows", until_it_leaves)

    async def ask_and_leave() -> None:
        async with door.stub.ListWorkflows.open() as stream:
            await stream.send_message(pb.ListWorkflowsRequest(), end=True)
            await call_trio(reached.wait)
            await stream.cancel()

    await run_aio(ask_and_leave())
    with trio.fail_after(10):
        while "grpc_call method=ListWorkflows" not in caplog.text:
            await trio.lowlevel.checkpoint()
    await door.start()  # a turn of the loop later
    assert [record.message.split()[0] for record in caplog.records if record.levelname == "ERROR"] == ours


async def test_a_start_whose_client_gives_up_is_finished_all_the_same(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = door.house.store.create
    reached, go_on, created = trio.Event(), trio.Event(), trio.Event()

    async def slow(new: Any) -> Any:
        reached.set()
        await go_on.wait()
        result = await create(new)
        created.set()
        return result

    monkeypatch.setattr(door.house.store, "create", slow)

    async def start_and_leave() -> None:
        async with door.stub.StartSaga.open() as stream:
            await stream.send_message(pb.StartSagaRequest(workflow_name="order", correlation_id="left"), end=True)
            await call_trio(reached.wait)
            await stream.cancel()

    await run_aio(start_and_leave())
    await door.ask(door.stub.ListWorkflows, pb.ListWorkflowsRequest())  # behind the reset on the same connection
    go_on.set()
    with trio.fail_after(5):
        await created.wait()
        page = await door.ask(door.stub.ListSagas, pb.ListSagasRequest(correlation_id="left"))
        assert (await door.ended(page.sagas[0].id)).saga.status == "COMPLETED"


async def test_times_keep_their_microseconds(door: Door) -> None:
    saga_id = await door.start()
    stored = await door.house.service.saga(saga_id)
    sent = (await door.ended(saga_id)).saga.created_at
    assert datetime.fromtimestamp(sent.seconds, UTC).replace(microsecond=sent.nanos // 1000) == stored.created_at
