-- The relay: what is still to be published, in order.
CREATE INDEX idx_outbox_unpublished ON saga.outbox (id) WHERE published_at IS NULL;
DROP TABLE saga.outbox_dead;
DROP TABLE saga.outbox_partitions;
DROP TABLE saga.outbox_relays;
ALTER TABLE saga.outbox DROP COLUMN relay_partition;
