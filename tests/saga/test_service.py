"""What clients can ask for: every answer and every refusal of `saga/service.py`, over a worker and virtual time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.errors import Conflict, Invalid, NotFound, PayloadTooLarge, Unavailable, WorkflowInvalid
from saga.json_bounds import MAX_DEPTH
from saga.model import Saga, SagaStatus
from saga.ports import Record, SagaFilter
from saga.service import StartSaga
from saga.supervisor import Limits
from tests.saga.at_work import reasons, settle, start, store_of
from tests.saga.at_work import settled_worker_of as worker_of
from tests.saga.samples import patient, step, workflow
from tests.support.world import Behaviour, Worker, World, hang, late, memory_store, ok, refuse

S = SagaStatus
ONCE = patient(1)
ONE_STEP = workflow(step("a", timeout_secs=600.0), timeout_secs=None)

YAML = """
name: order
steps:
  - {name: a, service: svc, method: Svc.A}
  - {name: b, service: svc, method: Svc.B, compensate: Svc.UndoB}
"""


# --- start -----------------------------------------------------------------------------------------------------------


async def test_a_saga_that_is_started_is_durable_and_told_as_it_was_asked_for(autojump_clock: MockClock) -> None:
    async with worker_of({}, workflow()) as worker:
        started = await worker.service.start(
            StartSaga(
                workflow_name="order",
                payload={"n": 1},
                correlation_id="c-1",
                initiated_by="me",
                traceparent=f"00-{'a' * 32}-{'b' * 16}-01",
            )
        )
        saga = started.saga
        assert (saga.status, saga.payload, saga.correlation_id, saga.initiated_by) == (
            S.STARTED,
            {"n": 1},
            "c-1",
            "me",
        )
        assert (saga.workflow_name, saga.workflow_version, started.replayed) == ("order", 1, False)
        assert saga.created_at == worker.world.clock.now()
        assert await worker.store.get(saga.saga_id) is not None
        await worker.end_of(saga.saga_id)
        assert {seen.call.traceparent[3:35] for seen in worker.world.seen} == {"a" * 32}


async def test_a_saga_of_an_unknown_workflow_is_not_started(autojump_clock: MockClock) -> None:
    async with worker_of({}) as worker:
        with pytest.raises(NotFound, match=r"^workflow not found: order$"):
            await start(worker)
        assert (await worker.service.list_sagas(SagaFilter())).total_count == 0


@pytest.mark.parametrize(
    ("request_fields", "expected"),
    [
        ({"workflow_name": ""}, [("workflow_name", "length")]),
        ({"workflow_name": "x" * 256}, [("workflow_name", "length")]),
        ({"workflow_name": "a\x00b"}, [("workflow_name", "characters")]),
        ({"correlation_id": ""}, [("correlation_id", "length")]),
        ({"correlation_id": "c" * 256}, [("correlation_id", "length")]),
        ({"initiated_by": "a\nb"}, [("initiated_by", "characters")]),
        ({"idempotency_key": "k" * 256}, [("Idempotency-Key", "length")]),
        ({"idempotency_key": ""}, [("Idempotency-Key", "length")]),
        ({"payload": {"a": "\x00"}}, [("payload", "nul_character")]),
        ({"payload": {"a\x00": 1}}, [("payload", "nul_character")]),
        ({"payload": {"a": [{"b": "x\x00y"}]}}, [("payload", "nul_character")]),
        (
            {"correlation_id": "", "initiated_by": "", "payload": {"a": "\x00"}},
            [("correlation_id", "length"), ("initiated_by", "length"), ("payload", "nul_character")],
        ),
    ],
)
async def test_every_field_that_breaks_its_rule_is_named(
    request_fields: dict[str, Any], expected: list[tuple[str, str]], autojump_clock: MockClock
) -> None:
    async with worker_of({}, workflow()) as worker:
        with pytest.raises(Invalid) as caught:
            await worker.service.start(StartSaga(**{"workflow_name": "order", **request_fields}))
        assert reasons(caught.value) == expected
        assert (await worker.service.list_sagas(SagaFilter())).total_count == 0


async def test_text_that_only_looks_like_a_nul_is_taken(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        saga = await worker.service.saga(await start(worker, payload={"a": "\\u0000"}))
        assert saga.payload == {"a": "\\u0000"}


async def test_a_string_no_database_takes_is_refused_by_its_field(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        with pytest.raises(Invalid) as caught:
            await start(worker, payload={"half": "\ud800"})
        assert reasons(caught.value) == [("payload", "not_json")]


async def test_names_of_255_characters_are_taken(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        name = "é" * 255
        saga = await worker.service.saga(
            await start(worker, correlation_id=name, initiated_by=name, idempotency_key=name)
        )
        assert (saga.correlation_id, saga.initiated_by) == (name, name)


async def test_the_size_limit_counts_the_bytes_of_the_json(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP, max_payload_bytes=100) as worker:
        fits = {"a": "é" * 46}
        assert len(msgspec.json.encode(fits)) == 100
        await start(worker, payload=fits)
        with pytest.raises(PayloadTooLarge) as caught:
            await start(worker, payload={"a": "é" * 46 + "x"})
        assert reasons(caught.value) == [("payload", "too_large")]
        assert caught.value.message == "payload is 101 bytes, the limit is 100"


async def test_a_payload_nested_too_deep_is_refused(autojump_clock: MockClock) -> None:
    def nested(levels: int) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for _ in range(levels - 1):
            value = {"a": value}
        return value

    async with worker_of({}, ONE_STEP) as worker:
        await start(worker, payload=nested(MAX_DEPTH))
        for levels in (MAX_DEPTH + 1, 1000):
            with pytest.raises(Invalid) as caught:
                await start(worker, payload=nested(levels))
            assert reasons(caught.value) == [("payload", "too_deep")]


@pytest.mark.parametrize(
    "header", ["", "00-xyz", f"00-{'0' * 32}-{'b' * 16}-01", f"ff-{'a' * 32}-{'b' * 16}-01", "\x00"]
)
async def test_a_malformed_trace_context_is_ignored(header: str, autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        saga = await worker.end_of(await start(worker, traceparent=header))
        assert (saga.status, saga.traceparent) == (S.COMPLETED, None)
        assert worker.world.seen[0].call.traceparent.startswith(f"00-{saga.saga_id.replace('-', '')}-")


# --- the idempotency key ---------------------------------------------------------------------------------------------


async def test_the_same_key_with_the_same_body_is_the_same_saga(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        request = StartSaga(workflow_name="order", payload={"a": 1, "b": [2]}, idempotency_key="k")
        first = await worker.service.start(request)
        turned = msgspec.structs.replace(request, payload={"b": [2], "a": 1})
        again = await worker.service.start(turned)
        assert (first.replayed, again.replayed) == (False, True)
        assert first.saga.saga_id == again.saga.saga_id
        await worker.end_of(first.saga.saga_id)
        assert (await worker.service.start(request)).saga.status is S.COMPLETED
        assert len(worker.world.seen) == 1
        assert worker.meter.counts["started"] == 1
        assert worker.supervisor.room == 100


@pytest.mark.parametrize(
    "other",
    [{"payload": {"a": 2}}, {"correlation_id": "c"}, {"initiated_by": "i"}, {"payload": {}}, {"workflow_name": "two"}],
)
async def test_the_same_key_with_another_body_is_a_conflict(other: dict[str, Any], autojump_clock: MockClock) -> None:
    two = workflow(step("a"), name="two")
    async with worker_of({}, ONE_STEP, two) as worker:
        request = StartSaga(workflow_name="order", payload={"a": 1}, idempotency_key="k")
        await worker.service.start(request)
        with pytest.raises(Conflict):
            await worker.service.start(msgspec.structs.replace(request, **other))
        assert (await worker.service.list_sagas(SagaFilter())).total_count == 1
        assert worker.supervisor.room >= 99


async def test_two_requests_with_one_key_at_once_start_one_saga(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        ids: list[str] = []

        async def ask() -> None:
            ids.append(await start(worker, idempotency_key="k"))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert len(set(ids)) == 1
        await worker.end_of(ids[0])
        assert len(worker.world.seen) == 1


async def test_without_a_key_every_request_is_a_saga_of_its_own(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        assert await start(worker) != await start(worker)


# --- cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("behaviour", "end"), [(ok(), S.COMPLETED), (refuse(), S.FAILED), (hang(), S.CANCELLED)])
async def test_a_saga_that_is_over_cannot_be_cancelled(
    behaviour: Behaviour, end: SagaStatus, autojump_clock: MockClock
) -> None:
    async with worker_of({"a": [behaviour]}, ONE_STEP) as worker:
        saga = await start(worker)
        await settle()
        if end is S.CANCELLED:
            await worker.service.cancel(saga)
        before = await worker.end_of(saga)
        assert before.status is end
        with pytest.raises(Conflict, match=f"^saga {saga} is already {end}$"):
            await worker.service.cancel(saga)
        assert await worker.service.saga(saga) == before


async def test_a_cancel_asked_for_twice_is_accepted_twice(autojump_clock: MockClock) -> None:
    async with worker_of({"b": [hang()], "undo a": [late(5.0)]}, workflow()) as worker:
        saga = await start(worker)
        await worker.world.until_called("b")
        await worker.service.cancel(saga)
        await trio.sleep(1.0)
        assert (await worker.service.cancel(saga)).status is S.COMPENSATING
        assert (await worker.end_of(saga)).status is S.CANCELLED
        assert worker.world.order == ["a", "b", "undo a"]


async def test_a_cancel_that_was_accepted_survives_the_worker(autojump_clock: MockClock) -> None:
    world = World({"b": [hang()]})
    async with memory_store(world, workflow()) as store:
        old, new = Worker(store.port, world, name="old"), Worker(store.port, world, name="new")
        async with old.at_work():
            await settle()
            saga = await start(old)
            await world.until_called("b")
        accepted = await new.service.cancel(saga)  # nobody runs it now
        assert (accepted.status, accepted.cancel_requested) == (S.RUNNING, True)
        async with new.at_work():
            assert (await new.end_of(saga)).status is S.CANCELLED
        assert world.order == ["a", "b", "undo a"]


async def test_a_waiting_saga_that_is_claimed_while_it_is_cancelled_ends_cancelled(
    autojump_clock: MockClock,
) -> None:
    async with worker_of({"a": [late(50.0)]}, ONE_STEP, limits=Limits(max_concurrent=1)) as worker:
        await start(worker)
        waiting = await start(worker)
        await settle()

        async def claimed_first(record: Record) -> None:
            del store_of(worker).before["record"]
            await worker.store.register_worker("other", 1000.0)
            assert await worker.store.claim_due_sagas("other", 1)

        store_of(worker).before["record"] = claimed_first
        await worker.service.cancel(waiting)
        now = await worker.service.saga(waiting)
        assert (now.status, now.cancel_requested, now.owner) == (S.STARTED, True, "other")


# --- retry-compensation ----------------------------------------------------------------------------------------------


async def failed_undo(worker: Worker) -> Saga:
    """A saga whose first undo has failed for good."""
    return await worker.end_of(await start(worker))


UNDO_FAILS = workflow(step("a", compensate_retry=ONCE), step("b", compensate_retry=ONCE), step("c", retry=ONCE))


async def test_failed_compensations_are_run_again_at_once_and_alone(autojump_clock: MockClock) -> None:
    script = {"c": [refuse()], "undo b": [refuse("ABORTED"), ok()]}
    async with worker_of(script, UNDO_FAILS) as worker:
        ended = await failed_undo(worker)
        assert (ended.status, ended.compensation_failed) == (S.FAILED, True)
        await trio.sleep(0.25)
        again = await worker.service.retry_compensation(ended.saga_id)
        assert (again.status, again.undo_plan, again.owner) == (S.COMPENSATING, (1,), None)
        await settle()
        over = await worker.service.saga(ended.saga_id)
        assert (over.status, over.compensation_failed, over.error_message) == (S.FAILED, False, ended.error_message)
        assert worker.world.order == ["a", "b", "c", "undo b", "undo a", "undo b"]
        assert worker.world.seen[-1].at == 0.25
        assert worker.world.seen[-1].call.epoch == ended.epoch + 1
        with pytest.raises(Conflict, match="has no failed compensation to retry"):
            await worker.service.retry_compensation(ended.saga_id)


async def test_there_is_nothing_to_retry_while_a_saga_runs_or_after_a_clean_end(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(5.0)]}, ONE_STEP) as worker:
        saga = await start(worker)
        with pytest.raises(Conflict):
            await worker.service.retry_compensation(saga)
        await worker.end_of(saga)
        with pytest.raises(Conflict):
            await worker.service.retry_compensation(saga)


async def test_two_operators_at_once_retry_once(autojump_clock: MockClock) -> None:
    script = {"c": [refuse()], "undo b": [refuse("ABORTED"), late(1.0)]}
    async with worker_of(script, UNDO_FAILS) as worker:
        ended = await failed_undo(worker)
        results: list[str] = []

        async def ask() -> None:
            try:
                await worker.service.retry_compensation(ended.saga_id)
            except Conflict:
                results.append("conflict")
            else:
                results.append("accepted")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
        await worker.end_of(ended.saga_id)
        assert sorted(results) == ["accepted", "conflict"]
        assert worker.world.order.count("undo b") == 2


async def test_a_cancelled_saga_stays_cancelled_through_a_retry(autojump_clock: MockClock) -> None:
    script = {"b": [hang()], "undo a": [refuse("ABORTED"), ok()]}
    async with worker_of(script, workflow(step("a", compensate_retry=ONCE), step("b"))) as worker:
        saga = await start(worker)
        await worker.world.until_called("b")
        await worker.service.cancel(saga)
        assert (await worker.end_of(saga)).compensation_failed
        await worker.service.retry_compensation(saga)
        over = await worker.end_of(saga)
        assert (over.status, over.compensation_failed) == (S.CANCELLED, False)


# --- workflows -------------------------------------------------------------------------------------------------------


async def test_a_workflow_is_registered_under_a_new_version_only_if_it_differs(autojump_clock: MockClock) -> None:
    async with worker_of({}) as worker:
        service = worker.service
        first = await service.register_workflow(YAML)
        same = await service.register_workflow("# the same in other words\n" + YAML)
        other = await service.register_workflow(YAML.replace("name: a,", "name: aa,"))
        assert [(one.workflow.version, one.changed) for one in (first, same, other)] == [
            (1, True),
            (1, False),
            (2, True),
        ]
        assert (await service.workflow("order")).version == 2
        assert [(one.definition.name, one.version) for one in await service.workflows()] == [("order", 2)]


async def test_a_definition_that_breaks_rules_is_refused_with_each_of_them(autojump_clock: MockClock) -> None:
    async with worker_of({}) as worker:
        with pytest.raises(WorkflowInvalid) as caught:
            await worker.service.register_workflow(YAML.replace("svc", "nobody").replace("name: b", "name: ''"))
        assert [detail.field for detail in caught.value.details] == [
            "steps[0].service",
            "steps[1].name",
            "steps[1].service",
        ]
        assert await worker.service.workflows() == []
        with pytest.raises(NotFound, match=r"^workflow not found: order$"):
            await worker.service.workflow("order")


async def test_new_sagas_start_on_the_version_just_registered(autojump_clock: MockClock) -> None:
    async with worker_of({}) as worker:
        await worker.service.register_workflow(YAML)
        first = await worker.service.saga(await start(worker))
        await worker.service.register_workflow(YAML.replace("name: a,", "name: aa,"))
        second = await worker.service.saga(await start(worker))
        assert (first.workflow_version, second.workflow_version) == (1, 2)


async def test_a_registration_is_not_hidden_by_a_look_up_that_began_before_it(autojump_clock: MockClock) -> None:
    async with worker_of({}) as worker, trio.open_nursery() as nursery:
        await worker.service.register_workflow(YAML)
        await trio.sleep(5.0)
        gate = trio.Event()

        async def hold(*args: Any) -> None:
            del store_of(worker).after["workflow"]
            await gate.wait()

        store_of(worker).after["workflow"] = hold
        nursery.start_soon(worker.service.workflow, "order")
        await settle()
        await worker.service.register_workflow(YAML.replace("name: a,", "name: aa,"))
        gate.set()
        await settle()
        assert (await worker.service.workflow("order")).version == 2


async def test_a_version_registered_elsewhere_is_seen_after_a_moment(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        assert (await worker.service.workflow("order")).version == 1
        await worker.store.register_workflow(workflow(), "")
        await trio.sleep(1.5)
        assert (await worker.service.workflow("order")).version == 2


# --- when the store is away ------------------------------------------------------------------------------------------


async def test_every_question_says_that_the_store_is_away(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        saga = await start(worker)
        await worker.end_of(saga)
        await trio.sleep(5.0)
        store_of(worker).away = True
        service = worker.service
        asked = [
            lambda: start(worker),
            lambda: service.get(saga),
            lambda: service.cancel(saga),
            lambda: service.retry_compensation(saga),
            lambda: service.list_sagas(SagaFilter()),
            lambda: service.register_workflow(YAML),
            service.workflows,
            lambda: service.workflow("order"),
            service.check_database,
            service.count_open,
        ]
        for ask in asked:
            with pytest.raises(Unavailable):
                await ask()
        store_of(worker).away = False
        await service.check_database()


async def test_open_sagas_are_counted_by_state(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP, limits=Limits(max_concurrent=1)) as worker:
        await start(worker)
        await start(worker)
        await settle()
        assert await worker.service.count_open() == {S.RUNNING: 1, S.STARTED: 1}
