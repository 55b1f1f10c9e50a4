"""Events of the outbox as messages: the JSON of spec section 6, and CloudEvents 1.0 headers in Kafka's binary mode."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

SOURCE = "/k1s0/system/saga"
"""CloudEvents `source`: a URI reference; with the id it names an event in the whole world."""


class OutboxEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that waits, with what its message is made of. `id` orders the events of a saga; `event_id` stays the
    same however often the event is sent. `payload` is JSON text."""

    id: int
    event_id: str
    saga_id: str
    event_type: str
    status: str
    current_step: int
    error_message: str | None
    created_at: datetime
    workflow_name: str
    workflow_version: int
    correlation_id: str | None
    initiated_by: str | None
    payload: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent to a topic. Messages of one key keep their order."""

    topic: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int


class EventBody(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON value, its fields in this order."""

    event_id: str
    event_type: str
    saga_id: str
    workflow_name: str
    workflow_version: int
    status: str
    current_step: int
    correlation_id: str | None
    initiated_by: str | None
    payload: msgspec.Raw
    error_message: str | None
    timestamp: str


def message_of(event: OutboxEvent, topic: str) -> Message:
    """The message of an event, the same each time it is made."""
    timestamp = event.created_at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = EventBody(
        event_id=event.event_id,
        event_type=event.event_type,
        saga_id=event.saga_id,
        workflow_name=event.workflow_name,
        workflow_version=event.workflow_version,
        status=event.status,
        current_step=event.current_step,
        correlation_id=event.correlation_id,
        initiated_by=event.initiated_by,
        payload=msgspec.Raw(event.payload.encode()),
        error_message=event.error_message,
        timestamp=timestamp,
    )
    return Message(
        topic=topic,
        key=event.saga_id.encode(),
        value=msgspec.json.encode(body),
        headers=(
            ("ce_specversion", b"1.0"),
            ("ce_id", event.event_id.encode()),
            ("ce_source", SOURCE.encode()),
            ("ce_type", event.event_type.encode()),
            ("ce_time", timestamp.encode()),
            ("ce_subject", event.saga_id.encode()),
            ("content-type", b"application/json"),
        ),
        timestamp_ms=int(event.created_at.timestamp() * 1000),
    )
