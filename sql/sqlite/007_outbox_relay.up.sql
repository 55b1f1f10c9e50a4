-- Where events go that the broker will never take. One process, one relay: the outbox is not shared out.

-- Messages that were refused for good. No foreign keys: they are kept until somebody has looked at them, also when the
-- saga is gone.
CREATE TABLE outbox_dead (
    -- The event's id in the outbox.
    id         INTEGER NOT NULL,
    topic      TEXT    NOT NULL,
    event_id   TEXT    NOT NULL,
    saga_id    TEXT    NOT NULL,
    event_type TEXT    NOT NULL,
    -- What was to be sent: the JSON of the event.
    message    TEXT    NOT NULL,
    reason     TEXT    NOT NULL,
    refused_at TEXT    NOT NULL,
    -- Promise: a message refused twice (its relay was killed in between) is here once.
    PRIMARY KEY (id, topic)
) STRICT;
