-- Sagas. updated_at is set by a trigger.

-- name: create_sagas
-- for: a batch of new sagas with their announcements and audit entries; those whose id or idempotency key is known do
-- not come back.
-- only here: one statement over arrays, so that a batch is one round trip; SQLite has none (there: create_saga).
WITH created AS (
    INSERT INTO saga.saga_states (
        id, workflow_name, workflow_version, payload, correlation_id, initiated_by, idempotency_key, request_digest,
        traceparent, tracestate, owner, epoch, claim_id, created_at, updated_at
    )
    SELECT n.id, n.workflow_name, n.workflow_version, n.payload::jsonb, n.correlation_id, n.initiated_by,
           n.idempotency_key, n.request_digest, n.traceparent, n.tracestate, n.owner, n.epoch, n.claim_id,
           coalesce(:now::timestamptz, NOW()), coalesce(:now::timestamptz, NOW())
    FROM unnest(
        :saga_ids::uuid[], :workflow_names::text[], :workflow_versions::int[], :payloads::text[],
        :correlation_ids::text[], :initiated_bys::text[], :idempotency_keys::text[], :request_digests::text[],
        :traceparents::text[], :tracestates::text[], :owners::text[], :epochs::int[], :claim_ids::uuid[]
    ) AS n (
        id, workflow_name, workflow_version, payload, correlation_id, initiated_by, idempotency_key, request_digest,
        traceparent, tracestate, owner, epoch, claim_id
    )
    ON CONFLICT DO NOTHING
    RETURNING id, created_at, workflow_name, workflow_version
), announced AS (
    INSERT INTO saga.outbox (saga_id, event_type, status, current_step)
    SELECT id, 'SAGA_STARTED', 'STARTED', 0 FROM created WHERE :events::bool
), audited AS (
    INSERT INTO saga.audit_log (
        created_at, action, principal, roles, address, request_id, door, saga_id, workflow_name, workflow_version,
        state_after
    )
    SELECT c.created_at, 'START_SAGA', a.principal, a.roles, a.address, a.request_id, a.door, c.id, c.workflow_name,
           c.workflow_version, '{"status":"STARTED","revision":0}'
    FROM unnest(
        :saga_ids, :principals::text[], :roles::text[], :addresses::text[], :request_ids::text[], :doors::text[]
    ) AS a (saga_id, principal, roles, address, request_id, door)
    JOIN created AS c ON c.id = a.saga_id
)
SELECT id, created_at FROM created;

-- name: sagas_made_earlier
-- for: what stands in the way of new sagas: those with their ids, and those with their idempotency keys.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision,
       idempotency_key, request_digest, claim_id
FROM saga.saga_states
WHERE id = ANY (:saga_ids::uuid[]) OR idempotency_key = ANY (:idempotency_keys::text[]);

-- name: record_moves
-- for: a batch of moves with their logs and announcements, each only if its row is still the one the decision was taken
-- from; those that are not do not come back. Two moves of one saga must not share a batch.
-- only here: one statement over arrays, so that a batch is one round trip; SQLite has neither arrays nor writing CTEs
-- (there: record_move, add_step_log, add_event).
WITH moved AS (
    UPDATE saga.saga_states AS s SET
        status = m.status,
        current_step = m.current_step,
        error_message = m.error_message,
        compensation_failed = m.compensation_failed,
        attempt = m.attempt,
        -- A cancel that came first is not put off by the pause of a retry that will not be made.
        next_attempt_at = CASE WHEN NOT (m.status = 'RUNNING' AND s.cancel_requested) THEN
            coalesce(:now::timestamptz, clock_timestamp()) + m.retry_in_secs * interval '1 second'
        END,
        deadline_at = coalesce(
            coalesce(:now::timestamptz, clock_timestamp()) + m.deadline_in_secs * interval '1 second', s.deadline_at
        ),
        outcome_unknown = m.outcome_unknown,
        undo_plan = m.undo_plan::jsonb,
        undo_failed = m.undo_failed::jsonb,
        undo_corrections = m.undo_corrections::jsonb,
        undo_since = CASE WHEN m.status = 'COMPENSATING' OR m.undo_failed <> '[]' THEN
            coalesce(s.undo_since, :now::timestamptz, clock_timestamp())
        END,
        ended_at = CASE WHEN m.status IN ('COMPLETED', 'FAILED', 'CANCELLED') THEN
            coalesce(:now::timestamptz, clock_timestamp())
        END,
        owner = m.owner,
        epoch = m.epoch,
        revision = m.revision_before + 1
    FROM unnest(
        :saga_ids::uuid[], :owners_before::text[], :epochs_before::int[], :revisions_before::int[], :statuses::text[],
        :current_steps::int[], :error_messages::text[], :compensations_failed::bool[], :attempts::int[],
        :retries_in_secs::float8[], :deadlines_in_secs::float8[], :outcomes_unknown::bool[], :undo_plans::text[],
        :undos_failed::text[], :undos_corrections::text[], :owners::text[], :epochs::int[]
    ) AS m (
        saga_id, owner_before, epoch_before, revision_before, status, current_step, error_message, compensation_failed,
        attempt, retry_in_secs, deadline_in_secs, outcome_unknown, undo_plan, undo_failed, undo_corrections,
        owner, epoch
    )
    WHERE s.id = m.saga_id
      AND s.owner IS NOT DISTINCT FROM m.owner_before
      AND s.epoch = m.epoch_before
      AND s.revision = m.revision_before
      AND NOT (m.status IN ('COMPLETED', 'FAILED') AND s.cancel_requested)
    RETURNING s.id, s.updated_at, s.next_attempt_at, s.deadline_at, s.cancel_requested
), logged AS (
    INSERT INTO saga.saga_step_logs (
        saga_id, step_index, step_name, action, status, request_payload, response_payload, error_message, started_at,
        completed_at, attempts
    )
    SELECT l.saga_id, l.step_index, l.step_name, l.action, l.status, l.request_payload::jsonb,
           l.response_payload::jsonb, l.error_message, l.started_at, l.completed_at, l.attempts
    FROM unnest(
        :log_saga_ids::uuid[], :log_step_indexes::int[], :log_step_names::text[], :log_actions::text[],
        :log_statuses::text[], :log_request_payloads::text[], :log_response_payloads::text[],
        :log_error_messages::text[], :log_started_ats::timestamptz[], :log_completed_ats::timestamptz[],
        :log_attempts::int[]
    ) WITH ORDINALITY AS l (
        saga_id, step_index, step_name, action, status, request_payload, response_payload, error_message, started_at,
        completed_at, attempts, place
    )
    JOIN moved ON moved.id = l.saga_id
    -- The identity column follows this order, and with it the history that is shown.
    ORDER BY l.place
), announced AS (
    INSERT INTO saga.outbox (saga_id, event_type, status, current_step, error_message)
    SELECT e.saga_id, e.event_type, e.status, e.current_step, e.error_message
    FROM unnest(
        :event_saga_ids::uuid[], :event_types::text[], :event_statuses::text[], :event_current_steps::int[],
        :event_error_messages::text[]
    ) WITH ORDINALITY AS e (saga_id, event_type, status, current_step, error_message, place)
    JOIN moved ON moved.id = e.saga_id
    -- The relay publishes in the order of the ids.
    ORDER BY e.place
)
SELECT id, updated_at, next_attempt_at, deadline_at, cancel_requested FROM moved;

-- name: sagas_by_ids
-- for: the rows as they are now.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision
FROM saga.saga_states
WHERE id = ANY (:saga_ids::uuid[]);

-- name: list_sagas
-- for: a stretch of a list, newest first; a filter that is NULL lets all through.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision
FROM saga.saga_states
WHERE (:workflow_name::text IS NULL OR workflow_name = :workflow_name)
  AND (:status::text IS NULL OR status = :status)
  AND (:correlation_id::text IS NULL OR correlation_id = :correlation_id)
  AND (:compensation_failed::bool IS NULL OR compensation_failed = :compensation_failed)
  AND (:created_after::timestamptz IS NULL OR created_at >= :created_after)
  AND (:created_before::timestamptz IS NULL OR created_at < :created_before)
  AND (:after_created_at::timestamptz IS NULL OR (created_at, id) < (:after_created_at, :after_id::uuid))
ORDER BY created_at DESC, id DESC
LIMIT :limit::bigint OFFSET :offset::bigint;

-- name: count_sagas
-- for: how many list_sagas would give without limit, offset and cursor.
SELECT count(*) AS total
FROM saga.saga_states
WHERE (:workflow_name::text IS NULL OR workflow_name = :workflow_name)
  AND (:status::text IS NULL OR status = :status)
  AND (:correlation_id::text IS NULL OR correlation_id = :correlation_id)
  AND (:compensation_failed::bool IS NULL OR compensation_failed = :compensation_failed)
  AND (:created_after::timestamptz IS NULL OR created_at >= :created_after)
  AND (:created_before::timestamptz IS NULL OR created_at < :created_before);

-- name: count_open_sagas
-- for: how many sagas are in each state that is not final.
SELECT status, count(*) AS total
FROM saga.saga_states
WHERE status IN ('STARTED', 'RUNNING', 'COMPENSATING')
GROUP BY status;

-- name: request_cancel_unless_terminal
-- for: the durable request; a saga that waits becomes due, save one that compensates: its retry keeps its pause.
UPDATE saga.saga_states SET
    cancel_requested = true,
    next_attempt_at = CASE WHEN status = 'COMPENSATING' THEN next_attempt_at END
WHERE id = :saga_id::uuid AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
RETURNING id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by,
          error_message, created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at,
          deadline_at, outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch,
          revision;

-- name: claim_due_sagas
-- for: taking the oldest open sagas nobody owns and that are due, with the responses their next steps may need. Rows
-- another worker is taking are passed over. Also taken: what this worker got by claims whose answers were lost.
-- Those that wait for nothing and those whose instant has come are found apart, each by an index of its own
-- (idx_saga_states_claimable, idx_saga_states_parked), so that what is still parked is not looked at. Of the latter the
-- thousand longest due are put in order; a claim while more are due at once takes the oldest of these.
WITH waiting AS (
    SELECT id, created_at
    FROM saga.saga_states
    WHERE owner IS NULL
      AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
      AND next_attempt_at IS NULL
    ORDER BY created_at, id
    LIMIT :limit::bigint
    FOR UPDATE SKIP LOCKED
), longest_due AS MATERIALIZED (
    SELECT id
    FROM saga.saga_states
    WHERE owner IS NULL
      AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
      -- now() is fixed for the statement, so that it can bound the scan; clock_timestamp() would be asked at each row.
      AND next_attempt_at <= coalesce(:now::timestamptz, now())
    ORDER BY next_attempt_at
    LIMIT greatest(:limit::bigint, 1000)
), woken AS (
    SELECT s.id, s.created_at
    FROM saga.saga_states AS s JOIN longest_due USING (id)
    WHERE s.owner IS NULL
      AND s.status IN ('STARTED', 'RUNNING', 'COMPENSATING')
    ORDER BY s.created_at, s.id
    LIMIT :limit
    FOR UPDATE OF s SKIP LOCKED
), due AS (
    SELECT id FROM (SELECT id, created_at FROM waiting UNION ALL SELECT id, created_at FROM woken) AS both_kinds
    ORDER BY created_at, id
    LIMIT :limit::bigint
), lost AS (
    SELECT id
    FROM saga.saga_states
    WHERE owner = :worker_id::text
      AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
      AND claim_id = ANY (:lost_claim_ids::uuid[])
    FOR UPDATE  -- and asked again when it is had: meanwhile it may have gone to another worker
), claimed AS (
    UPDATE saga.saga_states AS s SET owner = :worker_id::text, epoch = s.epoch + 1, claim_id = :claim_id::uuid
    FROM (SELECT id FROM due UNION ALL SELECT id FROM lost) AS taken
    WHERE s.id = taken.id
    RETURNING s.id, s.workflow_name, s.workflow_version, s.current_step, s.status, s.payload, s.correlation_id,
              s.initiated_by, s.error_message, s.created_at, s.updated_at, s.compensation_failed, s.cancel_requested,
              s.attempt, s.next_attempt_at, s.deadline_at, s.outcome_unknown, s.undo_plan, s.undo_failed,
              s.undo_corrections, s.traceparent, s.tracestate, s.owner, s.epoch, s.revision
)
SELECT claimed.*,
       greatest(0, coalesce(extract(epoch FROM next_attempt_at - coalesce(:now, clock_timestamp())), 0))::float8
           AS due_in_secs,
       extract(epoch FROM deadline_at - coalesce(:now, clock_timestamp()))::float8 AS deadline_in_secs,
       (SELECT jsonb_object_agg(l.step_name, l.response_payload)
        FROM saga.saga_step_logs AS l
        WHERE l.saga_id = claimed.id AND l.action = 'EXECUTE' AND l.status = 'SUCCESS') AS responses
FROM claimed;

-- name: open_sagas_of_worker
-- for: what a worker owns, to be held against what it runs. idx_saga_states_owner.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision
FROM saga.saga_states
WHERE owner = :worker_id::text AND status IN ('STARTED', 'RUNNING', 'COMPENSATING');

-- name: release_if_owned
-- for: giving one saga up; an earlier wake-up time stays unless a new one is given. The revision stays: only a move
-- raises it, by which a move that is sent again knows itself.
UPDATE saga.saga_states SET
    owner = NULL,
    outcome_unknown = outcome_unknown OR :interrupted::bool,
    next_attempt_at = coalesce(
        coalesce(:now::timestamptz, clock_timestamp()) + :retry_in_secs::float8 * interval '1 second', next_attempt_at
    )
WHERE id = :saga_id::uuid AND owner = :owner::text AND epoch = :epoch::int
  AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
RETURNING id;
