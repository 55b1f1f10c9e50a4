-- The outbox: who relays which part of it, what is to be published, and what became of it.

-- name: lock_outbox_partitions
-- for: sharing out the partitions, one relay at a time.
-- only here: SQLite has one process and one relay.
SELECT id FROM saga.outbox_partitions ORDER BY id FOR UPDATE;

-- name: keep_relay
-- for: a relay that is alive, or alive again.
-- only here: SQLite has one process and one relay.
INSERT INTO saga.outbox_relays (id, lease_until)
VALUES (:relay_id::text, coalesce(:now::timestamptz, clock_timestamp()) + :lease_secs::float8 * interval '1 second')
ON CONFLICT (id) DO UPDATE SET lease_until = excluded.lease_until;

-- name: remove_expired_relays
-- for: relays that did not say in time that they are alive; their partitions are free.
-- only here: SQLite has one process and one relay.
DELETE FROM saga.outbox_relays WHERE lease_until < coalesce(:now::timestamptz, clock_timestamp());

-- name: remove_relay
-- for: a relay that ends in order; its partitions are free.
-- only here: SQLite has one process and one relay.
DELETE FROM saga.outbox_relays WHERE id = :relay_id::text;

-- name: outbox_partitions
-- for: who has which partition, and among how many relays they are to be shared.
-- only here: SQLite has one process and one relay.
SELECT id, relay, (SELECT count(*) FROM saga.outbox_relays) AS relays FROM saga.outbox_partitions ORDER BY id;

-- name: give_up_partitions
-- for: what a relay has beyond its share.
-- only here: SQLite has one process and one relay.
UPDATE saga.outbox_partitions SET relay = NULL WHERE relay = :relay_id::text AND id = ANY (:partitions::int[]);

-- name: take_free_partitions
-- for: what a relay lacks of its share.
-- only here: SQLite has one process and one relay.
UPDATE saga.outbox_partitions SET relay = :relay_id::text WHERE relay IS NULL AND id = ANY (:partitions::int[]);

-- name: pending_events
-- for: the oldest unpublished events of the partitions that this relay has now, with what their messages are made of.
-- The owner is asked in the same statement: a relay that has lost its partitions finds nothing. LIMIT 1 keeps the
-- planner from joining whole tables. idx_outbox_pending.
SELECT e.id, e.event_id, e.saga_id, e.event_type, e.status, e.current_step, e.error_message, e.created_at,
       s.workflow_name, s.workflow_version, s.correlation_id, s.initiated_by, s.payload
FROM (
    SELECT o.*
    FROM saga.outbox_partitions AS p
    CROSS JOIN LATERAL (
        SELECT id, event_id, saga_id, event_type, status, current_step, error_message, created_at
        FROM saga.outbox
        WHERE relay_partition = p.id AND published_at IS NULL
        ORDER BY id
        LIMIT :limit::bigint
    ) AS o
    WHERE p.relay = :relay_id::text
    ORDER BY o.id
    LIMIT :limit::bigint
) AS e
CROSS JOIN LATERAL (
    SELECT workflow_name, workflow_version, correlation_id, initiated_by, payload
    FROM saga.saga_states
    WHERE id = e.saga_id
    LIMIT 1
) AS s
ORDER BY e.id;

-- name: settle_events
-- for: what became of events: acknowledged by the broker, or refused for good and laid aside. One transaction.
-- only here: one statement over arrays; SQLite has neither arrays nor writing CTEs (there: mark_event_published,
-- add_dead_message, remove_event).
WITH laid_aside AS (
    INSERT INTO saga.outbox_dead (id, topic, event_id, saga_id, event_type, message, reason, refused_at)
    SELECT o.id, d.topic, o.event_id, o.saga_id, o.event_type, d.message, d.reason,
           coalesce(:now::timestamptz, clock_timestamp())
    FROM unnest(:dead_ids::bigint[], :dead_topics::text[], :dead_messages::text[], :dead_reasons::text[])
        AS d (id, topic, message, reason)
    JOIN saga.outbox AS o ON o.id = d.id
    ON CONFLICT DO NOTHING
), removed AS (
    DELETE FROM saga.outbox WHERE id = ANY (:removed_ids::bigint[])
)
UPDATE saga.outbox SET published_at = coalesce(:now::timestamptz, clock_timestamp())
WHERE id = ANY (:published_ids::bigint[]) AND published_at IS NULL;

-- name: outbox_backlog
-- for: how many events wait in the partitions of a relay (counted up to :limit in each), and since when the oldest.
-- idx_outbox_pending.
SELECT count(*) AS pending,
       greatest(0, extract(epoch FROM coalesce(:now::timestamptz, clock_timestamp()) - min(o.created_at)))::float8
           AS oldest_secs
FROM saga.outbox_partitions AS p
CROSS JOIN LATERAL (
    SELECT created_at
    FROM saga.outbox
    WHERE relay_partition = p.id AND published_at IS NULL
    ORDER BY id
    LIMIT :limit::bigint
) AS o
WHERE p.relay = :relay_id::text;
