"""Payment: charges a card, and refunds the charge. The card "declined" is refused."""

from __future__ import annotations

import sys

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from demo.journal import Journal
from demo.participant import main, say
from demo.proto.orders_grpc import PaymentServiceBase
from demo.proto.orders_pb2 import Charged, ChargeRequest, OrderRef, Undone


class Payment(PaymentServiceBase):
    def __init__(self) -> None:
        self._journal = Journal()
        self.charged = 0
        self.refunded = 0

    async def Charge(self, stream: Stream[ChargeRequest, Charged]) -> None:
        request = await stream.recv_message()
        assert request is not None  # a unary call without a message does not get here

        def charge() -> Charged:
            if request.card == "declined":
                say("payment", f"declined the card of {request.order_id}")
                # A code that is not retried by default: the next attempt would be refused as well.
                raise GRPCError(Status.FAILED_PRECONDITION, "card declined")
            self.charged += request.amount_cents
            say("payment", f"charged {_money(request.amount_cents)} for {request.order_id}")
            return Charged(charge_id=f"C-{request.order_id}", amount_cents=request.amount_cents)

        await stream.send_message(self._journal.once(stream.metadata, charge))

    async def Refund(self, stream: Stream[OrderRef, Undone]) -> None:
        request = await stream.recv_message()
        assert request is not None

        def refund(charge: Charged) -> None:
            self.refunded += charge.amount_cents
            say("payment", f"refunded {_money(charge.amount_cents)} for {request.order_id}")

        undone = self._journal.undo(stream.metadata, refund)
        if not undone.was_done:
            say("payment", f"nothing to refund for {request.order_id}")
        await stream.send_message(undone)

    def ledger(self) -> dict[str, int]:
        return {
            "charged_cents": self.charged,
            "refunded_cents": self.refunded,
            "kept_cents": self.charged - self.refunded,
        }


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"


if __name__ == "__main__":
    payment = Payment()
    sys.exit(main("payment", payment, payment.ledger))
