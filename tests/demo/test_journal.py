"""The promises of a participant, kept by the demo's journal."""

from __future__ import annotations

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from demo.journal import Journal
from demo.proto.orders_pb2 import Charged

EXECUTE = {"idempotency-key": "saga-1:0:execute"}
UNDO = {"idempotency-key": "saga-1:0:compensate"}


class Till:
    """Something to have an effect on."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.balance = 0

    def charge(self) -> Charged:
        def act() -> Charged:
            self.balance += 10
            return Charged(charge_id=f"C{self.balance}", amount_cents=10)

        return self.journal.once(EXECUTE, act)

    def refund(self) -> bool:
        def act(charged: Charged) -> None:
            self.balance -= charged.amount_cents

        return self.journal.undo(UNDO, act).was_done


def test_the_same_key_gets_the_same_answer_and_has_one_effect() -> None:
    till = Till()
    assert till.charge() == till.charge()
    assert till.balance == 10


def test_an_undo_that_is_repeated_has_one_effect() -> None:
    till = Till()
    till.charge()
    assert [till.refund(), till.refund()] == [True, True]
    assert till.balance == 0


def test_undoing_what_was_never_done_succeeds() -> None:
    till = Till()
    assert till.refund() is False
    assert till.balance == 0


def test_an_action_that_comes_after_its_undo_is_refused() -> None:
    till = Till()
    till.refund()
    with pytest.raises(GRPCError) as refused:
        till.charge()
    assert refused.value.status is Status.FAILED_PRECONDITION
    assert till.balance == 0


def test_an_error_is_not_kept_so_that_a_later_attempt_can_succeed() -> None:
    till = Till()

    def refuse() -> Charged:
        raise GRPCError(Status.UNAVAILABLE, "later")

    with pytest.raises(GRPCError):
        till.journal.once(EXECUTE, refuse)
    assert till.charge().amount_cents == 10


def test_a_call_without_a_key_is_refused() -> None:
    with pytest.raises(GRPCError) as refused:
        Journal().once({}, Charged)
    assert refused.value.status is Status.INVALID_ARGUMENT
