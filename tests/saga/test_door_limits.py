"""The places and the room of a door."""

from __future__ import annotations

import pytest

from saga.door_limits import MAX_HEADERS, SMALL_BODY_BYTES, BodyRoom, Places, Room, check_header_count
from saga.errors import Invalid, Overloaded


def test_a_newcomer_gets_the_place_of_the_connection_that_has_been_idle_longest() -> None:
    closed: list[str] = []
    places: Places[str] = Places(3)
    for name in ("a", "b", "c"):
        assert places.take(name, lambda name=name: closed.append(name))  # type: ignore[misc]  # a default of a lambda
    places.busy("a")
    places.busy("b")
    places.idle("b")
    assert places.take("d", lambda: closed.append("d"))
    assert closed == ["c"]
    assert places.take("e", lambda: closed.append("e"))
    assert closed == ["c", "b"]
    assert len(places) == 3


def test_a_newcomer_is_turned_away_when_all_are_busy_and_comes_in_when_one_has_left() -> None:
    places: Places[str] = Places(1)
    assert places.take("a", lambda: None)
    places.busy("a")
    assert not places.take("b", lambda: None)
    places.leave("a")
    places.idle("a")  # its last request ends after it has left
    assert places.take("b", lambda: None)
    assert len(places) == 1


def test_a_door_that_is_shut_closes_all_and_lets_nobody_in() -> None:
    closed: list[str] = []
    places: Places[str] = Places(2)
    assert places.take("a", lambda: closed.append("a"))
    assert places.take("b", lambda: closed.append("b"))
    places.busy("b")
    places.shut()
    assert closed == ["a", "b"]
    assert not places.take("c", lambda: closed.append("c"))
    assert len(places) == 0


def test_room_is_given_back_and_more_than_there_is_is_refused() -> None:
    room = Room(2, "requests")
    room.take()
    room.take()
    assert room.is_full
    with pytest.raises(Overloaded, match="too many requests at a time"):
        room.take()
    room.give()
    room.take()
    assert room.taken == 2


def test_small_bodies_come_in_however_full_the_room_for_large_ones_is() -> None:
    bodies = BodyRoom(1000)
    with bodies.body() as first, bodies.body() as second:
        first(SMALL_BODY_BYTES + 400)
        first(SMALL_BODY_BYTES + 1000)
        second(SMALL_BODY_BYTES)
        with pytest.raises(Overloaded):
            second(SMALL_BODY_BYTES + 1)
        assert bodies.taken == 1000
    assert bodies.taken == 0


def test_headers_are_counted() -> None:
    check_header_count(MAX_HEADERS)
    with pytest.raises(Invalid) as caught:
        check_header_count(MAX_HEADERS + 1)
    assert [detail.reason for detail in caught.value.details] == ["too_many_headers"]
