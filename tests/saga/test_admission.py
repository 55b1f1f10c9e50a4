"""Whether another saga may be started: by how many are on their way, and for how long."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from saga.admission import Admission
from saga.errors import Overloaded, Unavailable


async def test_as_many_starts_as_allowed_are_under_way_and_the_next_is_told_to_come_again() -> None:
    admission = Admission(max_starts=2)
    with admission.start():
        with admission.start():
            with pytest.raises(Overloaded, match="too many sagas are being started"), admission.start():
                pass
            assert (len(admission), admission.refused) == (2, 1)
        with admission.start():
            assert len(admission) == 2
    assert len(admission) == 0


async def test_starts_are_refused_while_the_oldest_has_waited_too_long_and_no_longer(autojump_clock: MockClock) -> None:
    admission = Admission(stalled_secs=5.0)
    with admission.start():
        await trio.sleep(4.9)
        with admission.start():
            pass
        await trio.sleep(0.2)
        with pytest.raises(Overloaded, match="takes too long"), admission.start():
            pass
    with admission.start():
        pass


async def test_a_start_that_fails_or_is_cancelled_leaves_its_place(autojump_clock: MockClock) -> None:
    admission = Admission(max_starts=1)
    with pytest.raises(Unavailable, match="away"), admission.start():
        raise Unavailable("away")
    with trio.move_on_after(1), admission.start():
        await trio.sleep_forever()
    assert len(admission) == 0
