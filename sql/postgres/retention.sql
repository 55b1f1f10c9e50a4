-- The removal of what ended long ago.

-- name: remove_ended_sagas
-- for: a batch of the sagas that ended longest ago, with their logs, published events and idempotency keys (they are in
-- the row). Those with an event that is still to be published stay. One process at a time: the lock ends with the
-- statement's transaction, its number means nothing; whoever has not got it removes nothing. Rows that another
-- transaction is changing (an undo that is asked for again) are passed over.
WITH turn AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock(7241003916) AS is_mine
), ended AS (
    SELECT s.id
    FROM saga.saga_states AS s
    WHERE (SELECT is_mine FROM turn)
      AND s.ended_at < coalesce(:now::timestamptz, clock_timestamp()) - :age_secs::float8 * interval '1 second'
      AND NOT EXISTS (SELECT 1 FROM saga.outbox AS o WHERE o.saga_id = s.id AND o.published_at IS NULL)
    ORDER BY s.ended_at
    LIMIT :limit::bigint
    FOR UPDATE OF s SKIP LOCKED
)
DELETE FROM saga.saga_states AS s USING ended WHERE s.id = ended.id
RETURNING s.id;
