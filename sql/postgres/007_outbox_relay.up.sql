-- How the outbox is shared out among the relays of many workers, and where events go that the broker will never take.

-- By the last byte of the saga's id and not by a hash function of the server, which may change with its release: all
-- events of a saga are in one partition, whenever they were written.
ALTER TABLE saga.outbox ADD COLUMN relay_partition SMALLINT NOT NULL
    GENERATED ALWAYS AS (get_byte(uuid_send(saga_id), 15) % 16) STORED;

-- pending_events and outbox_backlog: what is still to be published, in order.
CREATE INDEX idx_outbox_pending ON saga.outbox (relay_partition, id) WHERE published_at IS NULL;
DROP INDEX saga.idx_outbox_unpublished;

-- Who relays now, and until when it counts. A handful of rows: no index but the key.
CREATE TABLE saga.outbox_relays (
    id          VARCHAR(255) PRIMARY KEY,
    lease_until TIMESTAMPTZ  NOT NULL
);

CREATE TABLE saga.outbox_partitions (
    id    SMALLINT     PRIMARY KEY,
    -- Promise: one relay a partition; that of a relay that is gone is free.
    relay VARCHAR(255) REFERENCES saga.outbox_relays (id) ON DELETE SET NULL
);
INSERT INTO saga.outbox_partitions (id) SELECT generate_series(0, 15);

-- Messages that were refused for good. No foreign keys: they are kept until somebody has looked at them, also when the
-- saga is gone.
CREATE TABLE saga.outbox_dead (
    -- The event's id in the outbox.
    id         BIGINT       NOT NULL,
    topic      VARCHAR(255) NOT NULL,
    event_id   UUID         NOT NULL,
    saga_id    UUID         NOT NULL,
    event_type VARCHAR(50)  NOT NULL,
    -- What was to be sent, as text: the JSON of the event.
    message    TEXT         NOT NULL,
    reason     TEXT         NOT NULL,
    refused_at TIMESTAMPTZ  NOT NULL,
    -- Promise: a message refused twice (its relay was killed in between) is here once.
    PRIMARY KEY (id, topic)
);
