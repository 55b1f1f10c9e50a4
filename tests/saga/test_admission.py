"""Whether another saga may be started: by how many are on their way, and for how long."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from saga.admission import Admission
from saga.errors import Overloaded, Unavailable
from saga.meter import Meter


class Refusals(Meter):
    """The reasons, in order."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def start_refused(self, reason: str) -> None:
        self.reasons.append(reason)


async def test_as_many_starts_as_allowed_are_under_way_and_the_next_is_told_to_come_again() -> None:
    admission, meter = Admission(max_starts=2), Refusals()
    with admission.start(meter):
        with admission.start(meter):
            with pytest.raises(Overloaded, match="too many sagas are being started"), admission.start(meter):
                pass
            assert (len(admission), meter.reasons) == (2, ["too_many"])
        with admission.start(meter):
            assert len(admission) == 2
    assert len(admission) == 0


async def test_starts_are_refused_while_the_oldest_has_waited_too_long_and_no_longer(autojump_clock: MockClock) -> None:
    admission, meter = Admission(stalled_secs=5.0), Refusals()
    with admission.start(meter):
        await trio.sleep(4.9)
        with admission.start(meter):
            pass
        await trio.sleep(0.2)
        with pytest.raises(Overloaded, match="takes too long"), admission.start(meter):
            pass
    with admission.start(meter):
        pass
    assert meter.reasons == ["stalled"]


async def test_a_start_that_fails_or_is_cancelled_leaves_its_place(autojump_clock: MockClock) -> None:
    admission, meter = Admission(max_starts=1), Refusals()
    with pytest.raises(Unavailable, match="away"), admission.start(meter):
        raise Unavailable("away")
    with trio.move_on_after(1), admission.start(meter):
        await trio.sleep_forever()
    assert len(admission) == 0
