-- The audit log. What changes something enters who asked for it in its own transaction.

-- name: add_audit_entry
-- for: one entry, in its caller's transaction.
INSERT INTO audit_log (
    created_at, action, outcome, principal, roles, address, request_id, door, saga_id, workflow_name, workflow_version,
    step_name, reason, state_before, state_after
) VALUES (
    coalesce(:now, clock_timestamp()), :action, :outcome, :principal, :roles, :address, :request_id, :door, :saga_id,
    :workflow_name, :workflow_version, :step_name, :reason, :state_before, :state_after
);

-- name: list_audit
-- for: a stretch of the log, newest first; a filter that is NULL lets all through. idx_audit_log_created_at.
SELECT id, created_at, action, outcome, principal, roles, address, request_id, door, saga_id, workflow_name,
       workflow_version, step_name, reason, state_before, state_after
FROM audit_log
WHERE (:principal IS NULL OR principal = :principal)
  AND (:action IS NULL OR action = :action)
  AND (:created_after IS NULL OR created_at >= :created_after)
  AND (:created_before IS NULL OR created_at < :created_before)
  AND (:after_created_at IS NULL OR (created_at, id) < (:after_created_at, :after_id))
ORDER BY created_at DESC, id DESC
LIMIT :limit;

-- name: list_audit_of_saga
-- for: the same of one saga; apart, so that it goes by idx_audit_log_saga_id.
SELECT id, created_at, action, outcome, principal, roles, address, request_id, door, saga_id, workflow_name,
       workflow_version, step_name, reason, state_before, state_after
FROM audit_log
WHERE saga_id = :saga_id
  AND (:principal IS NULL OR principal = :principal)
  AND (:action IS NULL OR action = :action)
  AND (:created_after IS NULL OR created_at >= :created_after)
  AND (:created_before IS NULL OR created_at < :created_before)
  AND (:after_created_at IS NULL OR (created_at, id) < (:after_created_at, :after_id))
ORDER BY created_at DESC, id DESC
LIMIT :limit;

-- name: set_audit_removal
-- for: how old an entry must be for the trigger to let it go, within this transaction; NULL at its end.
-- only here: SQLite has no settings of a transaction (there: part of remove_audit_before).
UPDATE audit_removal SET removing_before = after_secs(coalesce(:now, clock_timestamp()), -:age_secs);

-- name: remove_audit_before
-- for: entries kept long enough, oldest first.
DELETE FROM audit_log
WHERE id IN (
    SELECT id
    FROM audit_log
    WHERE created_at < after_secs(coalesce(:now, clock_timestamp()), -:age_secs)
    ORDER BY created_at, id
    LIMIT :limit
)
RETURNING id;
