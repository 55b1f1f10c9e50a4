"""A payment service that is broken: it refuses every card."""

from __future__ import annotations

import sys

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from demo.participant import main
from demo.payment import Payment
from demo.proto.orders_pb2 import Charged, ChargeRequest


class RefusingPayment(Payment):
    async def Charge(self, stream: Stream[ChargeRequest, Charged]) -> None:
        await stream.recv_message()
        raise GRPCError(Status.FAILED_PRECONDITION, "the till is closed")


if __name__ == "__main__":
    payment = RefusingPayment()
    sys.exit(main("payment", payment, payment.ledger))
