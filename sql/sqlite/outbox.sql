-- Announcements.

-- name: add_event
-- for: one announcement, in the transaction of its move.
-- only here: SQLite has no writing CTEs (there: part of record_moves and create_sagas).
INSERT INTO outbox (event_id, saga_id, event_type, status, current_step, error_message, created_at)
VALUES (:event_id, :saga_id, :event_type, :status, :current_step, :error_message, clock_timestamp());

-- name: pending_events
-- for: the oldest unpublished events, with what their messages are made of. CROSS JOIN: in this order. The relay is the
-- only one there is. idx_outbox_unpublished.
SELECT e.id, e.event_id, e.saga_id, e.event_type, e.status, e.current_step, e.error_message, e.created_at,
       s.workflow_name, s.workflow_version, s.correlation_id, s.initiated_by, s.payload
FROM (SELECT * FROM outbox WHERE published_at IS NULL AND :relay_id IS NOT NULL ORDER BY id LIMIT :limit) AS e
CROSS JOIN saga_states AS s ON s.id = e.saga_id
ORDER BY e.id;

-- name: mark_event_published
-- for: an event the broker has acknowledged.
-- only here: SQLite has no arrays (there: settle_events).
UPDATE outbox SET published_at = clock_timestamp() WHERE id = :id AND published_at IS NULL;

-- name: add_dead_message
-- for: a message the broker has refused for good, before its event is removed.
-- only here: SQLite has no arrays (there: settle_events).
INSERT INTO outbox_dead (id, topic, event_id, saga_id, event_type, message, reason, refused_at)
SELECT id, :topic, event_id, saga_id, event_type, :message, :reason, clock_timestamp() FROM outbox WHERE id = :id
ON CONFLICT DO NOTHING;

-- name: remove_event
-- for: an event that was laid aside.
-- only here: SQLite has no arrays (there: settle_events).
DELETE FROM outbox WHERE id = :id;

-- name: outbox_backlog
-- for: how many events wait (counted up to :limit), and since when the oldest. idx_outbox_unpublished.
SELECT count(*) AS pending,
       max(0, seconds_between(coalesce(min(created_at), clock_timestamp()), coalesce(:now, clock_timestamp())))
           AS oldest_secs
FROM (SELECT created_at FROM outbox WHERE published_at IS NULL AND :relay_id IS NOT NULL ORDER BY id LIMIT :limit);
