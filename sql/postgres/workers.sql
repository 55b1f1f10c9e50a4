-- Workers and their leases.

-- name: register_worker
-- for: a worker that starts, or starts again under its name.
INSERT INTO saga.workers (id, started_at, lease_until)
VALUES (
    :worker_id::text,
    clock_timestamp(),
    coalesce(:now::timestamptz, clock_timestamp()) + :lease_secs::float8 * interval '1 second'
)
ON CONFLICT (id) DO UPDATE SET started_at = excluded.started_at, lease_until = excluded.lease_until;

-- name: renew_lease_unless_ended
-- for: staying alive; no row: the lease had ended, and the sagas may have other owners.
UPDATE saga.workers SET
    lease_until = coalesce(:now::timestamptz, clock_timestamp()) + :lease_secs::float8 * interval '1 second'
WHERE id = :worker_id::text AND lease_until >= coalesce(:now::timestamptz, clock_timestamp())
RETURNING id;

-- name: remove_expired_workers
-- for: workers that did not renew in time.
DELETE FROM saga.workers WHERE lease_until < coalesce(:now::timestamptz, clock_timestamp());

-- name: remove_worker
-- for: a worker that ends in order.
DELETE FROM saga.workers WHERE id = :worker_id::text;

-- name: free_abandoned_sagas
-- for: open sagas whose owner is not a worker (any more). Also mends a write of a worker that was removed meanwhile.
-- The names of those that are gone are found first, and each row is held against them as it is when it is locked: asked
-- for it as a join, Postgres would take a row that has got a new and living owner since for one without (a recheck sees
-- nothing of the other table). Rows that are locked are for the next sweep, so that none can hold up all others.
WITH gone AS MATERIALIZED (
    SELECT DISTINCT s.owner
    FROM saga.saga_states AS s
    WHERE s.owner IS NOT NULL
      AND s.status IN ('STARTED', 'RUNNING', 'COMPENSATING')
      AND NOT EXISTS (SELECT 1 FROM saga.workers AS w WHERE w.id = s.owner)
), abandoned AS (
    SELECT id
    FROM saga.saga_states
    WHERE owner = ANY (ARRAY(SELECT owner FROM gone))
      AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
    FOR UPDATE SKIP LOCKED
)
UPDATE saga.saga_states AS s SET
    owner = NULL,
    outcome_unknown = s.outcome_unknown OR s.status = 'RUNNING'
FROM abandoned
WHERE s.id = abandoned.id
RETURNING s.id;

-- name: cancel_requests_of_worker
-- for: cancel requests that another worker accepted, told to the one that runs the saga. idx_saga_states_owner.
SELECT id
FROM saga.saga_states
WHERE owner = :worker_id::text AND status IN ('STARTED', 'RUNNING') AND cancel_requested;

-- name: free_sagas_of_worker
-- for: what a worker still owns when it ends in order. Rows that are locked are left to whoever sweeps next.
WITH owned AS (
    SELECT id
    FROM saga.saga_states
    WHERE owner = :worker_id::text AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
    FOR UPDATE SKIP LOCKED
)
UPDATE saga.saga_states AS s SET
    owner = NULL,
    outcome_unknown = s.outcome_unknown OR s.status = 'RUNNING'
FROM owned
WHERE s.id = owned.id
RETURNING s.id;

-- name: ping
-- for: readiness.
SELECT 1 AS alive;
