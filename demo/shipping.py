"""Shipping: books a carrier, which may take its time, and cancels the booking."""

from __future__ import annotations

import asyncio
import sys

from grpclib.server import Stream

from demo.journal import Journal
from demo.participant import main, say
from demo.proto.orders_grpc import ShippingServiceBase
from demo.proto.orders_pb2 import OrderRef, Shipment, ShipmentRequest, Undone


class Shipping(ShippingServiceBase):
    def __init__(self) -> None:
        self._journal = Journal()
        self.booked = 0
        self.cancelled = 0

    async def CreateShipment(self, stream: Stream[ShipmentRequest, Shipment]) -> None:
        request = await stream.recv_message()
        assert request is not None  # a unary call without a message does not get here

        def book() -> Shipment:
            self.booked += 1
            say("shipping", f"booked a shipment for {request.order_id}")
            return Shipment(tracking_id=f"S-{request.order_id}")

        if request.ship_delay_secs > 0 and not self._journal.knows(stream.metadata):
            say("shipping", f"asking the carrier about {request.order_id}")
            # A cancelled saga resets this call: the handler ends here and nothing is booked.
            await asyncio.sleep(request.ship_delay_secs)
        await stream.send_message(self._journal.once(stream.metadata, book))

    async def CancelShipment(self, stream: Stream[OrderRef, Undone]) -> None:
        request = await stream.recv_message()
        assert request is not None

        def cancel(shipment: Shipment) -> None:
            self.booked -= 1
            self.cancelled += 1
            say("shipping", f"cancelled shipment {shipment.tracking_id}")

        undone = self._journal.undo(stream.metadata, cancel)
        if not undone.was_done:
            say("shipping", f"nothing to cancel for {request.order_id}")
        await stream.send_message(undone)

    def ledger(self) -> dict[str, int]:
        return {"booked": self.booked, "cancelled": self.cancelled}


if __name__ == "__main__":
    shipping = Shipping()
    sys.exit(main("shipping", shipping, shipping.ledger))
