from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class OrderRef(_message.Message):
    __slots__ = ("order_id",)
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    def __init__(self, order_id: _Optional[str] = ...) -> None: ...

class Undone(_message.Message):
    __slots__ = ("was_done",)
    WAS_DONE_FIELD_NUMBER: _ClassVar[int]
    was_done: bool
    def __init__(self, was_done: _Optional[bool] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("order_id", "sku", "quantity")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    SKU_FIELD_NUMBER: _ClassVar[int]
    QUANTITY_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    sku: str
    quantity: int
    def __init__(self, order_id: _Optional[str] = ..., sku: _Optional[str] = ..., quantity: _Optional[int] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("reservation_id", "quantity")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    QUANTITY_FIELD_NUMBER: _ClassVar[int]
    reservation_id: str
    quantity: int
    def __init__(self, reservation_id: _Optional[str] = ..., quantity: _Optional[int] = ...) -> None: ...

class ChargeRequest(_message.Message):
    __slots__ = ("order_id", "amount_cents", "card")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_CENTS_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    amount_cents: int
    card: str
    def __init__(self, order_id: _Optional[str] = ..., amount_cents: _Optional[int] = ..., card: _Optional[str] = ...) -> None: ...

class Charged(_message.Message):
    __slots__ = ("charge_id", "amount_cents")
    CHARGE_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_CENTS_FIELD_NUMBER: _ClassVar[int]
    charge_id: str
    amount_cents: int
    def __init__(self, charge_id: _Optional[str] = ..., amount_cents: _Optional[int] = ...) -> None: ...

class ShipmentRequest(_message.Message):
    __slots__ = ("order_id", "ship_delay_secs")
    ORDER_ID_FIELD_NUMBER: _ClassVar[int]
    SHIP_DELAY_SECS_FIELD_NUMBER: _ClassVar[int]
    order_id: str
    ship_delay_secs: float
    def __init__(self, order_id: _Optional[str] = ..., ship_delay_secs: _Optional[float] = ...) -> None: ...

class Shipment(_message.Message):
    __slots__ = ("tracking_id",)
    TRACKING_ID_FIELD_NUMBER: _ClassVar[int]
    tracking_id: str
    def __init__(self, tracking_id: _Optional[str] = ...) -> None: ...

class LedgerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("entries",)
    class EntriesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.ScalarMap[str, int]
    def __init__(self, entries: _Optional[_Mapping[str, int]] = ...) -> None: ...
