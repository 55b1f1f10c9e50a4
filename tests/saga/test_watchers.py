"""Who is told of a move, in which order, and what is left behind: nothing."""

from __future__ import annotations

import msgspec
import trio
import trio.testing
from trio.testing import MockClock

from saga.model import Saga, SagaStatus
from saga.watchers import KEEP, Subscription, Watchers
from tests.saga.samples import running, saga


def taken(subscription: Subscription) -> list[Saga]:
    states = []
    while (state := subscription.take()) is not None:
        states.append(state)
    return states


def test_every_watcher_of_a_saga_is_told_every_state_in_order() -> None:
    watchers = Watchers()
    path = (running(1), running(2), saga(SagaStatus.COMPLETED))
    with watchers.subscribe(path[0].saga_id) as one, watchers.subscribe(path[0].saga_id) as two:
        watchers.publish(path[:2], path[1])
        watchers.publish(path[2:], path[2])
        assert taken(one) == taken(two) == list(path)


def test_a_watcher_is_told_of_its_saga_alone_and_only_from_then_on() -> None:
    watchers = Watchers()
    watchers.publish((running(1),), running(1))
    with watchers.subscribe("another") as other, watchers.subscribe(running().saga_id) as mine:
        watchers.publish((running(2),), running(2))
        assert taken(other) == []
        assert taken(mine) == [running(2)]


def test_a_watcher_that_has_gone_leaves_nothing_behind() -> None:
    watchers = Watchers()
    with watchers.subscribe("s"), watchers.subscribe("s"), watchers.subscribe("t"):
        assert len(watchers) == 3
    assert len(watchers) == 0
    assert watchers._by_saga == {}


def test_a_slow_watcher_loses_the_oldest_states_never_the_last() -> None:
    watchers = Watchers()
    with watchers.subscribe(running().saga_id) as slow:
        for step in range(KEEP + 10):
            watchers.publish((running(step),), running(step))
        states = taken(slow)
    assert len(states) == KEEP
    assert states[-1].current_step == KEEP + 9


def test_the_last_state_is_told_as_the_store_has_it() -> None:
    watchers = Watchers()
    stored = msgspec.structs.replace(running(2), revision=9)
    with watchers.subscribe(stored.saga_id) as mine:
        watchers.publish((running(1), running(2)), stored)
        assert taken(mine) == [running(1), stored]


def test_publishing_to_nobody_does_nothing() -> None:
    watchers = Watchers()
    watchers.publish((running(),), running())
    assert len(watchers) == 0


async def test_a_wait_ends_with_the_next_move_and_not_before(autojump_clock: MockClock) -> None:
    watchers = Watchers()
    with watchers.subscribe(running().saga_id) as mine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mine.wait)
            await trio.sleep(5.0)
            assert nursery.child_tasks
            watchers.publish((running(),), running())
            await trio.testing.wait_all_tasks_blocked()
            assert not nursery.child_tasks
        await mine.wait()  # a move that is there already is not waited for
        assert trio.current_time() == 5.0
