"""Inventory: reserves goods for an order, and puts them back."""

from __future__ import annotations

import sys

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream

from demo.journal import Journal
from demo.participant import main, say
from demo.proto.orders_grpc import InventoryServiceBase
from demo.proto.orders_pb2 import OrderRef, Reservation, ReserveRequest, Undone


class Inventory(InventoryServiceBase):
    def __init__(self) -> None:
        self._journal = Journal()
        self.stock = 100
        self.reserved = 0

    async def Reserve(self, stream: Stream[ReserveRequest, Reservation]) -> None:
        request = await stream.recv_message()
        assert request is not None  # a unary call without a message does not get here

        def reserve() -> Reservation:
            if request.quantity > self.stock:
                raise GRPCError(Status.FAILED_PRECONDITION, f"out of stock: {self.stock} x {request.sku} left")
            self.stock -= request.quantity
            self.reserved += request.quantity
            say("inventory", f"reserved {request.quantity} x {request.sku} for {request.order_id}")
            return Reservation(reservation_id=f"R-{request.order_id}", quantity=request.quantity)

        await stream.send_message(self._journal.once(stream.metadata, reserve))

    async def Release(self, stream: Stream[OrderRef, Undone]) -> None:
        request = await stream.recv_message()
        assert request is not None

        def release(reservation: Reservation) -> None:
            self.stock += reservation.quantity
            self.reserved -= reservation.quantity
            say("inventory", f"put back {reservation.quantity} of {request.order_id}")

        undone = self._journal.undo(stream.metadata, release)
        if not undone.was_done:
            say("inventory", f"nothing to put back for {request.order_id}")
        await stream.send_message(undone)

    def ledger(self) -> dict[str, int]:
        return {"stock": self.stock, "reserved": self.reserved}


if __name__ == "__main__":
    inventory = Inventory()
    sys.exit(main("inventory", inventory, inventory.ledger))
