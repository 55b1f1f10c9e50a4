"""Who asked for what, from the service into the log: each change with its entry, and denials within their bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from saga.access import ANONYMOUS, Principal, Role
from saga.audit import (
    IN_PROCESS,
    MAX_REASON,
    AuditAction,
    AuditEntry,
    AuditFilter,
    AuditOutcome,
    Door,
    Requester,
    requester,
)
from saga.denials import BURST, PRINCIPALS, REFILL_SECS, Denials
from saga.errors import Conflict, Invalid, NotFound, Unavailable
from saga.model import Saga
from saga.paging import MAX_PAGE_SIZE
from saga.payload_mask import NOTHING, PayloadMask
from saga.retention import BATCH, DAY_SECS, AuditRetention
from saga.service import StartSaga
from tests.saga.samples import patient, step, workflow
from tests.support.world import Behaviour, InterposedStore, Worker, World, hang, memory_store, refuse

ALICE = Requester(principal="alice", door=Door.REST, roles=("sys_operator",), address="10.0.0.7", request_id="r-1")
NOBODY = Requester(principal="nobody", door=Door.GRPC)
ONCE = patient(1)
A_UUID = "99999999-9999-4999-8999-999999999999"


@asynccontextmanager
async def worker_of(
    script: dict[str, list[Behaviour]] | None = None, payload_mask: PayloadMask = NOTHING
) -> AsyncIterator[Worker]:
    world = World(script)
    steps = [step(name, compensate_retry=ONCE, retry=ONCE) for name in "abc"]
    async with memory_store(world, workflow(*steps, timeout_secs=None)) as store:
        worker = Worker(store.port, world, payload_mask=payload_mask)
        async with worker.at_work():
            yield worker


async def start(worker: Worker, asked_by: Requester = ALICE, **request: Any) -> Saga:
    return (await worker.service.start(StartSaga(workflow_name="order", **request), asked_by)).saga


async def entries(worker: Worker, saga_id: str | None = None) -> list[AuditEntry]:
    """Without those of definitions, newest first."""
    page = await worker.service.audit.entries(AuditFilter(saga_id=saga_id))
    return [entry for entry in page.entries if entry.entered.action is not AuditAction.REGISTER_WORKFLOW]


async def failed_undo(worker: Worker) -> Saga:
    """A saga whose steps a and b were done and could not be undone."""
    worker.world.script |= {"c": [refuse()], "undo a": [refuse()], "undo b": [refuse()]}
    ended = await worker.end_of((await start(worker)).saga_id)
    assert ended.undo_failed
    return ended


async def test_a_start_and_a_cancel_are_entered_with_who_asked(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}) as worker:
        saga = await start(worker)
        await worker.service.cancel(saga.saga_id, NOBODY)
        cancelled, started = await entries(worker, saga.saga_id)
        assert (started.entered.action, started.entered.asked_by) == (AuditAction.START_SAGA, ALICE)
        assert (cancelled.entered.action, cancelled.entered.asked_by) == (AuditAction.CANCEL_SAGA, NOBODY)
        with pytest.raises(NotFound):
            await worker.service.cancel(A_UUID, ALICE)
        ended = await worker.end_of(saga.saga_id)
        with pytest.raises(Conflict):
            await worker.service.cancel(ended.saga_id, ALICE)
        assert len(await entries(worker)) == 2


async def test_a_cancel_has_its_reason_and_one_that_cannot_be_kept_cancels_nothing(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, payload_mask=PayloadMask(["card"])) as worker:
        saga = await start(worker)
        for reason in ("", " ", "x" * (MAX_REASON + 1), "a\x00", "a\ud800"):
            with pytest.raises(Invalid) as refused:
                await worker.service.cancel(saga.saga_id, ALICE, reason)
            assert [detail.field for detail in refused.value.details] == ["reason"]
        assert len(await entries(worker)) == 1
        await worker.service.cancel(saga.saga_id, ALICE, " asked for by phone,\ncard=4711 ")
        assert (await entries(worker))[0].entered.reason == "asked for by phone,\ncard=***"


async def test_a_replayed_start_is_not_a_second_one(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        first = await start(worker, idempotency_key="k")
        again = await worker.service.start(StartSaga(workflow_name="order", idempotency_key="k"), NOBODY)
        assert again.replayed
        assert again.saga.saga_id == first.saga_id
        assert [entry.entered.asked_by for entry in await entries(worker)] == [ALICE]


@pytest.mark.parametrize(
    ("asked_by", "said", "initiated_by"),
    [
        (ALICE, None, "alice"),
        (ALICE, "billing", "billing"),
        (NOBODY, None, None),
        (IN_PROCESS, None, None),
    ],
)
async def test_a_saga_is_initiated_by_whom_the_request_names_or_by_the_client_that_is_known(
    autojump_clock: MockClock, asked_by: Requester, said: str | None, initiated_by: str | None
) -> None:
    async with worker_of() as worker:
        saga = await start(worker, asked_by, initiated_by=said)
        assert saga.initiated_by == initiated_by


async def test_a_retry_is_entered_with_each_correction_and_its_reason(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        saga = await failed_undo(worker)
        steps = {
            "b": {"mark_done": True, "reason": "freed by hand"},
            "a": {"input": {"card": "secret"}, "reason": "typo"},
        }
        await worker.service.retry_compensation(saga.saga_id, steps, ALICE)
        found = [entry.entered for entry in reversed(await entries(worker, saga.saga_id))][1:]
        assert [(one.action.value, one.step_name, one.reason) for one in found] == [
            ("RETRY_COMPENSATION", None, None),
            ("CORRECT_COMPENSATION", "a", "typo"),
            ("MARK_DONE", "b", "freed by hand"),
        ]
        assert {one.asked_by for one in found} == {ALICE}
        retried = found[0]
        assert retried.before == {"status": "FAILED", "revision": saga.revision, "undo_failed": ["b", "a"]}
        assert retried.after == {"status": "COMPENSATING", "revision": saga.revision + 1}
        assert [(one.before, one.after) for one in found[1:]] == [
            ({"undo": "FAILED"}, {"undo": "CORRECTED"}),
            ({"undo": "FAILED"}, {"undo": "MARKED_DONE"}),
        ]
        assert "secret" not in str(found)


async def test_a_retry_that_is_refused_is_not_entered(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        saga = await failed_undo(worker)
        with pytest.raises(Invalid):
            await worker.service.retry_compensation(saga.saga_id, {"z": {}}, ALICE)
        done = await start(worker)
        await worker.end_of(done.saga_id)
        assert [entry.entered.action.value for entry in await entries(worker)] == ["START_SAGA", "START_SAGA"]


def test_what_a_token_says_of_itself_becomes_words_a_database_takes() -> None:
    principal = Principal(subject="a\x00b\ud800" + "x" * 300, roles=frozenset({Role.OPERATOR, Role.ADMIN}))
    asked_by = requester(principal, Door.REST, address="::1%eth\n0", request_id="r")
    assert asked_by.principal == "a?b?" + "x" * 251
    assert asked_by.roles == ("sys_admin", "sys_operator")
    assert asked_by.address == "::1%eth?0"
    assert asked_by.is_identified
    assert not requester(ANONYMOUS, Door.REST, address=None, request_id="r").is_identified


# --- reading it -------------------------------------------------------------------------------------------------------


async def test_pages_of_the_log_meet(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        ids = [(await start(worker)).saga_id for _ in range(5)]
        seen: list[str | None] = []
        cursor = None
        while True:
            where = AuditFilter(action=AuditAction.START_SAGA)
            page = await worker.service.audit.entries(where, page_size=2, cursor=cursor)
            seen += [entry.entered.saga_id for entry in page.entries]
            if (cursor := page.next_cursor) is None:
                break
        assert seen == ids[::-1]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": MAX_PAGE_SIZE + 1}, "page_size"),
        ({"cursor": "1"}, "cursor"),
        ({"cursor": "1_x"}, "cursor"),
        ({"where": AuditFilter(saga_id="nonsense")}, "saga_id"),
        ({"where": AuditFilter(principal="")}, "principal"),
        ({"where": AuditFilter(principal="a\x00")}, "principal"),
    ],
)
async def test_what_cannot_be_asked_of_the_log_is_refused(
    autojump_clock: MockClock, asked: dict[str, Any], field: str
) -> None:
    async with worker_of() as worker:
        with pytest.raises(Invalid) as refused:
            await worker.service.audit.entries(**({"where": AuditFilter()} | asked))
        assert [detail.field for detail in refused.value.details] == [field]


async def test_a_saga_is_found_by_its_id_however_it_is_written(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        saga = await start(worker)
        assert len(await entries(worker, saga.saga_id.upper())) == 1


# --- denials ----------------------------------------------------------------------------------------------------------


async def test_a_denied_change_is_entered_with_what_it_named(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        await worker.service.audit.note_denied(NOBODY, AuditAction.CANCEL_SAGA, A_UUID.upper())
        await worker.service.audit.note_denied(NOBODY, AuditAction.CANCEL_SAGA, "'; --")
        unnamed, named = (entry.entered for entry in await entries(worker))
        assert (named.outcome, named.asked_by, named.saga_id) == (AuditOutcome.DENIED, NOBODY, A_UUID)
        assert unnamed.saga_id is None


async def test_a_crowd_of_denials_leaves_a_few_entries_and_the_number_of_the_others(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        note = worker.service.audit.note_denied
        for _ in range(BURST + 30):
            await note(NOBODY, AuditAction.START_SAGA)
        assert len(await entries(worker)) == BURST
        await note(ALICE, AuditAction.START_SAGA)  # who is counted apart
        await trio.sleep(REFILL_SECS)
        await note(NOBODY, AuditAction.START_SAGA)
        last, other, *_ = (entry.entered for entry in await entries(worker))
        assert (last.asked_by, last.after) == (NOBODY, {"left_out": 30})
        assert (other.asked_by, other.after) == (ALICE, None)


async def test_a_denial_that_cannot_be_entered_does_not_fail_the_request(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker_of() as worker:
        store = worker.store
        assert isinstance(store, InterposedStore)
        store.before["add_audit_entry"] = away
        await worker.service.audit.note_denied(NOBODY, AuditAction.START_SAGA)
        assert "denial_not_entered action=START_SAGA principal=nobody" in caplog.text
        assert worker.service.audit.denials_lost == 1
        del store.before["add_audit_entry"]
        assert await entries(worker) == []


async def test_a_denial_is_entered_although_the_client_leaves_meanwhile(autojump_clock: MockClock) -> None:
    async with worker_of() as worker:
        assert isinstance(worker.store, InterposedStore)
        with trio.CancelScope() as client:

            async def leave(*_: Any) -> None:
                client.cancel()
                await trio.lowlevel.checkpoint()

            worker.store.before["add_audit_entry"] = leave
            await worker.service.audit.note_denied(NOBODY, AuditAction.START_SAGA)
        assert client.cancelled_caught
        assert [entry.entered.asked_by for entry in await entries(worker)] == [NOBODY]


async def away(*_: Any) -> None:
    await trio.lowlevel.checkpoint()
    raise Unavailable("no database")


def test_principals_that_are_counted_are_bounded_and_the_longest_silent_is_forgotten() -> None:
    denials = Denials()
    for _ in range(BURST):
        assert denials.admit("first", 0.0) == 0
        assert denials.admit("second", 0.0) == 0
    assert denials.admit("first", 0.0) is None
    for number in range(PRINCIPALS - 1):
        assert denials.admit(str(number), 0.0) == 0
    assert denials.admit("first", 0.0) is None
    assert denials.admit("second", 0.0) == 0


def test_an_allowance_never_grows_beyond_a_burst() -> None:
    denials = Denials()
    admitted = [denials.admit("p", 1e9) for _ in range(BURST + 1)]
    assert admitted == [0] * BURST + [None]
    assert [denials.admit("p", 2e9) for _ in range(BURST + 1)] == [1] + [0] * (BURST - 1) + [None]


# --- retention --------------------------------------------------------------------------------------------------------


async def test_old_entries_are_removed_a_batch_at_a_time(autojump_clock: MockClock) -> None:
    days = 0.001
    async with worker_of() as worker:
        keeper = AuditRetention(worker.store, days)
        for _ in range(BATCH + 3):
            await start(worker)
        assert await keeper.run_once() == 0
        await trio.sleep(days * DAY_SECS + 1)
        young = await start(worker)
        # Three starts and the registration are left of those that are old.
        assert [await keeper.run_once() for _ in range(3)] == [BATCH, 4, 0]
        page = await worker.service.audit.entries(AuditFilter())
        assert [entry.entered.saga_id for entry in page.entries] == [young.saga_id]
