-- The removal of what ended long ago.

-- name: remove_ended_sagas
-- for: a batch of the sagas that ended longest ago, with their logs, published events and idempotency keys (they are in
-- the row). Those with an event that is still to be published stay. One process and one writer here: nobody to agree
-- with.
DELETE FROM saga_states
WHERE id IN (
    SELECT s.id
    FROM saga_states AS s
    WHERE s.ended_at < after_secs(coalesce(:now, clock_timestamp()), -:age_secs)
      -- The plus keeps the index of what is unpublished out of it: all that waits for the broker is in there.
      AND NOT EXISTS (SELECT 1 FROM outbox AS o WHERE o.saga_id = s.id AND +o.published_at IS NULL)
    ORDER BY s.ended_at
    LIMIT :limit
)
RETURNING id;
