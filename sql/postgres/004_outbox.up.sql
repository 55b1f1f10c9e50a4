-- Announcements that commit with the move they tell of. The message is built from the saga's row when it is published,
-- so no payload is copied here.

CREATE TABLE saga.outbox (
    id            BIGSERIAL    PRIMARY KEY,
    event_id      UUID         NOT NULL DEFAULT gen_random_uuid(),
    saga_id       UUID         NOT NULL REFERENCES saga.saga_states (id) ON DELETE CASCADE,
    event_type    VARCHAR(50)  NOT NULL,
    status        VARCHAR(50)  NOT NULL,
    current_step  INT          NOT NULL,
    error_message TEXT,
    created_at    TIMESTAMPTZ  NOT NULL DEFAULT NOW(),
    published_at  TIMESTAMPTZ,
    -- Promise: the words of saga.model.EventType and SagaStatus, no others.
    CONSTRAINT outbox_event_type_check
        CHECK (event_type IN ('SAGA_STARTED', 'SAGA_RUNNING', 'SAGA_COMPLETED', 'SAGA_COMPENSATING', 'SAGA_FAILED',
                              'SAGA_CANCELLED', 'SAGA_COMPENSATION_FAILED')),
    CONSTRAINT outbox_status_check
        CHECK (status IN ('STARTED', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED', 'CANCELLED'))
);

-- The relay: what is still to be published, in order.
CREATE INDEX idx_outbox_unpublished ON saga.outbox (id) WHERE published_at IS NULL;
-- The events of one saga; and the cascade when a saga is deleted.
CREATE INDEX idx_outbox_saga_id ON saga.outbox (saga_id);
