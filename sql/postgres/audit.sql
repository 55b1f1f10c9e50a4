-- The audit log. What changes something enters who asked for it in its own statement or transaction.

-- name: add_audit_entry
-- for: one entry, in its caller's transaction.
INSERT INTO saga.audit_log (
    created_at, action, outcome, principal, roles, address, request_id, door, saga_id, workflow_name, workflow_version,
    step_name, reason, state_before, state_after
) VALUES (
    coalesce(:now::timestamptz, clock_timestamp()), :action::text, :outcome::text, :principal::text, :roles::text,
    :address::text, :request_id::text, :door::text, :saga_id::uuid, :workflow_name::text, :workflow_version::int,
    :step_name::text, :reason::text, :state_before::text::jsonb, :state_after::text::jsonb
);

-- name: list_audit
-- for: a stretch of the log, newest first; a filter that is NULL lets all through.
SELECT id, created_at, action, outcome, principal, roles, address, request_id, door, saga_id, workflow_name,
       workflow_version, step_name, reason, state_before, state_after
FROM saga.audit_log
WHERE (:principal::text IS NULL OR principal = :principal)
  AND (:action::text IS NULL OR action = :action)
  AND (:created_after::timestamptz IS NULL OR created_at >= :created_after)
  AND (:created_before::timestamptz IS NULL OR created_at < :created_before)
  AND (:after_created_at::timestamptz IS NULL OR (created_at, id) < (:after_created_at, :after_id::bigint))
ORDER BY created_at DESC, id DESC
LIMIT :limit::bigint;

-- name: list_audit_of_saga
-- for: the same of one saga; apart, so that no plan passes over the entries of all others. idx_audit_log_saga_id.
SELECT id, created_at, action, outcome, principal, roles, address, request_id, door, saga_id, workflow_name,
       workflow_version, step_name, reason, state_before, state_after
FROM saga.audit_log
WHERE saga_id = :saga_id::uuid
  AND (:principal::text IS NULL OR principal = :principal)
  AND (:action::text IS NULL OR action = :action)
  AND (:created_after::timestamptz IS NULL OR created_at >= :created_after)
  AND (:created_before::timestamptz IS NULL OR created_at < :created_before)
  AND (:after_created_at::timestamptz IS NULL OR (created_at, id) < (:after_created_at, :after_id::bigint))
ORDER BY created_at DESC, id DESC
LIMIT :limit::bigint;

-- name: remove_audit_before
-- for: entries kept long enough, oldest first. The trigger lets go what is older than the setting says, which holds for
-- this transaction alone; MATERIALIZED and joined, so that it is made before the first row is deleted.
WITH removing AS MATERIALIZED (
    SELECT set_config('saga.audit_removing_before', limits.instant::text, true), limits.instant
    FROM (
        SELECT coalesce(:now::timestamptz, clock_timestamp()) - :age_secs::float8 * interval '1 second' AS instant
    ) AS limits
), oldest AS (
    SELECT a.created_at, a.id
    FROM removing JOIN saga.audit_log AS a ON a.created_at < removing.instant
    ORDER BY a.created_at, a.id
    LIMIT :limit::bigint
)
DELETE FROM saga.audit_log AS a
USING oldest
WHERE a.created_at = oldest.created_at AND a.id = oldest.id
RETURNING a.id;
