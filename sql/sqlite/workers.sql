-- Workers and their leases.

-- name: register_worker
-- for: a worker that starts, or starts again under its name.
INSERT INTO workers (id, started_at, lease_until)
VALUES (:worker_id, clock_timestamp(), after_secs(coalesce(:now, clock_timestamp()), :lease_secs))
ON CONFLICT (id) DO UPDATE SET started_at = excluded.started_at, lease_until = excluded.lease_until;

-- name: renew_lease_unless_ended
-- for: staying alive; no row: the lease had ended, and the sagas may have other owners.
UPDATE workers SET lease_until = after_secs(coalesce(:now, clock_timestamp()), :lease_secs)
WHERE id = :worker_id AND lease_until >= coalesce(:now, clock_timestamp())
RETURNING id;

-- name: remove_expired_workers
-- for: workers that did not renew in time.
DELETE FROM workers WHERE lease_until < coalesce(:now, clock_timestamp());

-- name: remove_worker
-- for: a worker that ends in order.
DELETE FROM workers WHERE id = :worker_id;

-- name: remove_all_workers
-- for: the start of the embedded store: nobody else can be alive.
-- only here: the other database has many processes.
DELETE FROM workers;

-- name: free_abandoned_sagas
-- for: open sagas whose owner is not a worker (any more). Also mends a write of a worker that was removed meanwhile.
UPDATE saga_states SET
    owner = NULL,
    outcome_unknown = outcome_unknown OR status = 'RUNNING',
    updated_at = clock_timestamp()
WHERE owner IS NOT NULL
  AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
  AND NOT EXISTS (SELECT 1 FROM workers AS w WHERE w.id = saga_states.owner)
RETURNING id;

-- name: cancel_requests_of_worker
-- for: cancel requests that another worker accepted, told to the one that runs the saga. idx_saga_states_owner.
SELECT id
FROM saga_states
WHERE owner = :worker_id AND status IN ('STARTED', 'RUNNING') AND cancel_requested;

-- name: free_sagas_of_worker
-- for: what a worker still owns when it ends in order.
UPDATE saga_states SET
    owner = NULL,
    outcome_unknown = outcome_unknown OR status = 'RUNNING',
    updated_at = clock_timestamp()
WHERE owner = :worker_id AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
RETURNING id;

-- name: ping
-- for: readiness.
SELECT 1 AS alive;
