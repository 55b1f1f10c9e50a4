-- Announcements that commit with the move they tell of. The message is built from the saga's row when it is published,
-- so no payload is copied here.

CREATE TABLE outbox (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id      TEXT    NOT NULL,
    saga_id       TEXT    NOT NULL REFERENCES saga_states (id) ON DELETE CASCADE,
    event_type    TEXT    NOT NULL,
    status        TEXT    NOT NULL,
    current_step  INTEGER NOT NULL,
    error_message TEXT,
    created_at    TEXT    NOT NULL,
    published_at  TEXT,
    -- Promise: the words of saga.model.EventType and SagaStatus, no others.
    CONSTRAINT outbox_event_type_check
        CHECK (event_type IN ('SAGA_STARTED', 'SAGA_RUNNING', 'SAGA_COMPLETED', 'SAGA_COMPENSATING', 'SAGA_FAILED',
                              'SAGA_CANCELLED', 'SAGA_COMPENSATION_FAILED')),
    CONSTRAINT outbox_status_check
        CHECK (status IN ('STARTED', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED', 'CANCELLED'))
) STRICT;

-- The relay: what is still to be published, in order.
CREATE INDEX idx_outbox_unpublished ON outbox (id) WHERE published_at IS NULL;
-- The events of one saga; and the cascade when a saga is deleted.
CREATE INDEX idx_outbox_saga_id ON outbox (saga_id);
