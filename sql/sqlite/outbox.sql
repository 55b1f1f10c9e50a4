-- Announcements.

-- name: add_event
-- for: one announcement, in the transaction of its move.
-- only here: SQLite has no writing CTEs (there: part of record_moves and create_sagas).
INSERT INTO outbox (event_id, saga_id, event_type, status, current_step, error_message, created_at)
VALUES (:event_id, :saga_id, :event_type, :status, :current_step, :error_message, clock_timestamp());
