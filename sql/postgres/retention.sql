-- The removal of what ended long ago.

-- name: remove_ended_sagas
-- for: a batch of the sagas that ended longest ago, with their logs, published events and idempotency keys (they are in
-- the row). Those with an event that is still to be published stay. One process at a time: the lock ends with the
-- statement's transaction, its number means nothing; whoever has not got it removes nothing. Rows that another
-- transaction is changing (an undo that is asked for again) are passed over.
WITH turn AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock(7241003916) AS is_mine,
           coalesce(:now::timestamptz, clock_timestamp()) - :age_secs::float8 * interval '1 second' AS before
), ended AS (
    SELECT s.id
    FROM saga.saga_states AS s
    WHERE (SELECT is_mine FROM turn)
      -- By a sub-select: compared with a clock that runs, every saga that is kept would be read. idx_saga_states_ended_at.
      AND s.ended_at < (SELECT before FROM turn)
      -- OFFSET 0 and coalesce: asked saga by saga and by idx_outbox_saga_id. A join, or the index of what is unpublished,
      -- would go through all that waits for the broker.
      AND NOT EXISTS (
          SELECT 1
          FROM saga.outbox AS o
          WHERE o.saga_id = s.id AND coalesce(o.published_at, 'infinity') = 'infinity'
          OFFSET 0
      )
    ORDER BY s.ended_at
    LIMIT :limit::bigint
    FOR UPDATE OF s SKIP LOCKED
)
DELETE FROM saga.saga_states AS s WHERE s.id = ANY (ARRAY(SELECT id FROM ended))
RETURNING s.id;
