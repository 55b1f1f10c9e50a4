"""What clients are told of sagas: one, as it goes on, and a page of them."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from saga.errors import Invalid, NotFound
from saga.model import SagaStatus
from saga.paging import MAX_PAGE_SIZE
from saga.ports import SagaFilter
from saga.service import ELSEWHERE_POLL_SECS, SagaService, StartSaga
from tests.saga.at_work import UNKNOWN_ID, reasons, settle, start
from tests.saga.at_work import settled_worker_of as worker_of
from tests.saga.samples import patient, step, workflow
from tests.support.world import Worker, World, hang, late, memory_store, refuse, told

S = SagaStatus
ONCE = patient(1)
ONE_STEP = workflow(step("a", timeout_secs=600.0), timeout_secs=None)


# --- get -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [UNKNOWN_ID, "", "x", "1" * 36, "../../etc", "\x00" * 36, "{" + "0" * 34 + "}"])
async def test_an_unknown_or_malformed_id_is_not_found_at_every_door(bad: str, autojump_clock: MockClock) -> None:
    async with worker_of({}) as worker:
        service = worker.service
        for ask in (service.saga, service.get, service.cancel, service.retry_compensation):
            with pytest.raises(NotFound, match=r"^saga not found: "):
                await ask(bad)
        with service.watch(bad) as watch, pytest.raises(NotFound):
            await watch.next()
        assert len(worker.watchers) == 0


@pytest.mark.parametrize("form", ["{0}----", "{{{0}--}}", "{1}-{2}---", "-{0}---"])
async def test_an_id_with_its_hyphens_elsewhere_is_no_id(form: str, autojump_clock: MockClock) -> None:
    """Python's own UUID takes all of these; a cursor holds an id too."""
    async with worker_of({}, ONE_STEP) as worker:
        digits = (await start(worker)).replace("-", "")
        written = form.format(digits, digits[:4], digits[4:])
        assert len(written) == 36
        for ask in (worker.service.get, worker.service.cancel):
            with pytest.raises(NotFound):
                await ask(written)
        with pytest.raises(Invalid):
            await worker.service.list_sagas(SagaFilter(), cursor=f"1_{written}")


async def test_an_id_in_capitals_is_the_same_id(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP) as worker:
        saga = await start(worker)
        await settle()
        assert (await worker.service.get(saga.upper())).saga.saga_id == saga
        await worker.service.cancel(saga.upper())
        assert (await worker.service.get(saga.upper(), wait_secs=5.0)).saga.status is S.CANCELLED


async def test_a_saga_is_told_with_its_step_logs_oldest_first(autojump_clock: MockClock) -> None:
    async with worker_of({"c": [refuse()]}, workflow(step("a"), step("b"), step("c", retry=ONCE))) as worker:
        saga = await start(worker)
        detail = await worker.service.get(saga, wait_secs=60.0)
        assert detail.saga.status is S.FAILED
        assert told(detail.step_logs) == [
            "a EXECUTE SUCCESS x1",
            "b EXECUTE SUCCESS x1",
            "c EXECUTE FAILED x1",
            "b COMPENSATE SUCCESS x1",
            "a COMPENSATE SUCCESS x1",
        ]


async def test_a_long_poll_is_answered_in_the_instant_the_saga_ends(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [late(7.25)]}, ONE_STEP) as worker:
        detail = await worker.service.get(await start(worker), wait_secs=60.0)
        assert (detail.saga.status, worker.world.clock.seconds()) == (S.COMPLETED, 7.25)
        assert len(detail.step_logs) == 1
        assert len(worker.watchers) == 0


async def test_a_long_poll_is_answered_when_its_time_is_up(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP) as worker:
        detail = await worker.service.get(await start(worker), wait_secs=3.0)
        assert (detail.saga.status, worker.world.clock.seconds()) == (S.RUNNING, 3.0)
        assert len(worker.watchers) == 0


async def test_a_saga_that_is_over_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        saga = await start(worker)
        await worker.end_of(saga)
        before = worker.world.clock.seconds()
        await worker.service.get(saga, wait_secs=60.0)
        assert worker.world.clock.seconds() == before


# --- watch -----------------------------------------------------------------------------------------------------------


async def states_of(service: SagaService, saga: str) -> list[tuple[SagaStatus, int]]:
    states = []
    with service.watch(saga) as watch:
        while (state := await watch.next()) is not None:
            states.append((state.status, state.current_step))
        assert await watch.next() is None
    return states


async def test_a_watch_tells_each_state_in_order_and_the_terminal_one_last(autojump_clock: MockClock) -> None:
    definition = workflow(step("a"), step("b"), step("c", retry=ONCE))
    script = {"a": [late(1.0)], "b": [late(1.0)], "c": [refuse(after_secs=1.0)], "undo b": [late(1.0)]}
    async with worker_of(script, definition) as worker:
        saga = await start(worker)
        states = await states_of(worker.service, saga)
        assert states[-8:-7] in ([], [(S.STARTED, 0)])  # whether it was seen so early is Trio's throw of dice
        assert states[-7:] == [
            (S.RUNNING, 0),
            (S.RUNNING, 1),
            (S.RUNNING, 2),
            (S.COMPENSATING, 2),
            (S.COMPENSATING, 2),
            (S.COMPENSATING, 2),
            (S.FAILED, 2),
        ]
        assert len(worker.watchers) == 0


async def test_a_watch_of_a_saga_that_is_over_tells_its_end_alone(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        saga = await start(worker)
        await worker.end_of(saga)
        assert await states_of(worker.service, saga) == [(S.COMPLETED, 1)]


async def test_a_watch_sees_moves_made_by_another_worker(autojump_clock: MockClock) -> None:
    world = World({"a": [late(3.2)]})
    async with memory_store(world, ONE_STEP) as store:
        doer, onlooker = Worker(store.port, world, name="doer"), Worker(store.port, world, name="onlooker")
        async with doer.at_work():
            await settle()
            saga = await start(doer)
            states = await states_of(onlooker.service, saga)
        assert states in (
            [(S.STARTED, 0), (S.RUNNING, 0), (S.COMPLETED, 1)],
            [(S.RUNNING, 0), (S.COMPLETED, 1)],
        )
        assert world.clock.seconds() <= 3.2 + 2 * ELSEWHERE_POLL_SECS


async def test_a_watcher_that_is_cancelled_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP) as worker, trio.open_nursery() as nursery:
        saga = await start(worker)
        nursery.start_soon(states_of, worker.service, saga)
        await trio.sleep(2.0)
        assert len(worker.watchers) == 1
        nursery.cancel_scope.cancel()
    assert len(worker.watchers) == 0


# --- list ------------------------------------------------------------------------------------------------------------


async def test_pages_and_cursors_lead_through_all_sagas_newest_first(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        ids = [await start(worker) for _ in range(7)][::-1]
        pages = [await worker.service.list_sagas(SagaFilter(), page=page, page_size=3) for page in (1, 2, 3, 4)]
        assert [[saga.saga_id for saga in page.sagas] for page in pages] == [ids[:3], ids[3:6], ids[6:], []]
        assert [(page.total_count, page.page, page.page_size, page.has_next) for page in pages] == [
            (7, 1, 3, True),
            (7, 2, 3, True),
            (7, 3, 3, False),
            (7, 4, 3, False),
        ]
        walked, cursor = [], pages[0].next_cursor
        walked += [saga.saga_id for saga in pages[0].sagas]
        while cursor is not None:
            page = await worker.service.list_sagas(SagaFilter(), page_size=3, cursor=cursor)
            walked += [saga.saga_id for saga in page.sagas]
            assert page.has_next is (page.next_cursor is not None)
            cursor = page.next_cursor
        assert walked == ids


async def test_a_cursor_is_not_moved_by_sagas_started_meanwhile(autojump_clock: MockClock) -> None:
    async with worker_of({}, ONE_STEP) as worker:
        ids = [await start(worker) for _ in range(4)][::-1]
        first = await worker.service.list_sagas(SagaFilter(), page_size=2)
        await start(worker)
        second = await worker.service.list_sagas(SagaFilter(), page_size=2, cursor=first.next_cursor)
        assert [saga.saga_id for saga in (*first.sagas, *second.sagas)] == ids


async def test_a_list_holds_what_its_filter_lets_through(autojump_clock: MockClock) -> None:
    async with worker_of({"a": [hang()]}, ONE_STEP, workflow(step("z"), name="two")) as worker:
        mine = await start(worker, correlation_id="c-1")
        await worker.service.start(StartSaga(workflow_name="two"))
        await settle()
        for where in (
            SagaFilter(workflow_name="order"),
            SagaFilter(status=S.RUNNING),
            SagaFilter(correlation_id="c-1"),
        ):
            page = await worker.service.list_sagas(where)
            assert [saga.saga_id for saga in page.sagas] == [mine]
            assert page.total_count == 1


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"page": 0}, ["page"]),
        ({"page_size": 0}, ["page_size"]),
        ({"page_size": MAX_PAGE_SIZE + 1}, ["page_size"]),
        ({"page": -1, "page_size": -1}, ["page", "page_size"]),
        ({"page": 2**40}, ["page"]),
        ({"cursor": ""}, ["cursor"]),
        ({"cursor": "x"}, ["cursor"]),
        ({"cursor": f"12_{'0' * 36}"}, ["cursor"]),
        ({"cursor": f"99999999999999999_{UNKNOWN_ID}"}, None),
        ({"cursor": f"999999999999999999_{UNKNOWN_ID}"}, ["cursor"]),
        ({"cursor": f"0_{UNKNOWN_ID}"}, None),
    ],
)
async def test_a_list_that_is_out_of_range_names_its_fields(
    options: dict[str, Any], fields: list[str] | None, autojump_clock: MockClock
) -> None:
    async with worker_of({}) as worker:
        if fields is None:
            await worker.service.list_sagas(SagaFilter(), **options)
            return
        with pytest.raises(Invalid) as caught:
            await worker.service.list_sagas(SagaFilter(), **options)
        assert [field for field, _ in reasons(caught.value)] == fields
