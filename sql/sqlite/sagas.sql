-- Sagas. clock_timestamp() and after_secs(instant, secs) are functions the store defines on its connections: SQLite's
-- own stop at milliseconds and know nothing of the clock the store was given.

-- name: create_saga
-- for: one new saga; nothing happens where its id or its idempotency key is known.
-- only here: SQLite has no arrays; rows share a transaction instead (there: create_sagas).
INSERT INTO saga_states (
    id, workflow_name, workflow_version, payload, correlation_id, initiated_by, idempotency_key, request_digest,
    traceparent, tracestate, owner, epoch, created_at, updated_at
) VALUES (
    :saga_id, :workflow_name, :workflow_version, :payload, :correlation_id, :initiated_by, :idempotency_key,
    :request_digest, :traceparent, :tracestate, :owner, :epoch, :created_at, :created_at
)
ON CONFLICT DO NOTHING;

-- name: sagas_made_earlier
-- for: what stands in the way of a new saga: the one with its id, or the one with its idempotency key.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision,
       idempotency_key, request_digest, claim_id
FROM saga_states
WHERE id IN (SELECT value FROM json_each(:saga_ids))
   OR idempotency_key IN (SELECT value FROM json_each(:idempotency_keys));

-- name: newest_created_at
-- for: going on behind it, so that no two sagas carry the same created_at.
-- only here: one process writes; many writers cannot agree on such an order.
SELECT max(created_at) FROM saga_states;

-- name: record_move
-- for: one move of one saga, if the row is still the one the decision was taken from.
-- only here: SQLite has neither arrays nor writing CTEs (there: record_moves, with add_step_log and add_event in it).
UPDATE saga_states SET
    status = :status,
    current_step = :current_step,
    error_message = :error_message,
    compensation_failed = :compensation_failed,
    attempt = :attempt,
    -- A cancel that came first is not put off by the pause of a retry that will not be made.
    next_attempt_at = CASE WHEN NOT (:status = 'RUNNING' AND cancel_requested) THEN :next_attempt_at END,
    deadline_at = coalesce(:deadline_at, deadline_at),
    outcome_unknown = :outcome_unknown,
    undo_plan = :undo_plan,
    undo_failed = :undo_failed,
    undo_corrections = :undo_corrections,
    undo_since = CASE WHEN :status = 'COMPENSATING' OR :undo_failed <> '[]' THEN coalesce(undo_since, :updated_at) END,
    ended_at = CASE WHEN :status IN ('COMPLETED', 'FAILED', 'CANCELLED') THEN :updated_at END,
    owner = :owner,
    epoch = :epoch,
    revision = :revision_before + 1,
    updated_at = :updated_at
WHERE id = :saga_id
  AND owner IS :owner_before
  AND epoch = :epoch_before
  AND revision = :revision_before
  AND NOT (:status IN ('COMPLETED', 'FAILED') AND cancel_requested)
RETURNING updated_at, next_attempt_at, deadline_at, cancel_requested;

-- name: sagas_by_ids
-- for: the rows as they are now.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision
FROM saga_states
WHERE id IN (SELECT value FROM json_each(:saga_ids));

-- name: list_sagas
-- for: a stretch of a list, newest first; a filter that is NULL lets all through.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision
FROM saga_states
WHERE (:workflow_name IS NULL OR workflow_name = :workflow_name)
  AND (:status IS NULL OR status = :status)
  AND (:correlation_id IS NULL OR correlation_id = :correlation_id)
  AND (:compensation_failed IS NULL OR compensation_failed = :compensation_failed)
  AND (:created_after IS NULL OR created_at >= :created_after)
  AND (:created_before IS NULL OR created_at < :created_before)
  AND (:after_created_at IS NULL OR (created_at, id) < (:after_created_at, :after_id))
ORDER BY created_at DESC, id DESC
LIMIT :limit OFFSET :offset;

-- name: count_sagas
-- for: how many list_sagas would give without limit, offset and cursor.
SELECT count(*) AS total
FROM saga_states
WHERE (:workflow_name IS NULL OR workflow_name = :workflow_name)
  AND (:status IS NULL OR status = :status)
  AND (:correlation_id IS NULL OR correlation_id = :correlation_id)
  AND (:compensation_failed IS NULL OR compensation_failed = :compensation_failed)
  AND (:created_after IS NULL OR created_at >= :created_after)
  AND (:created_before IS NULL OR created_at < :created_before);

-- name: count_open_sagas
-- for: how many sagas are in each state that is not final.
SELECT status, count(*) AS total
FROM saga_states
WHERE status IN ('STARTED', 'RUNNING', 'COMPENSATING')
GROUP BY status;

-- name: request_cancel_unless_terminal
-- for: the durable request; a saga that waits becomes due, save one that compensates: its retry keeps its pause.
UPDATE saga_states SET
    cancel_requested = 1,
    next_attempt_at = CASE WHEN status = 'COMPENSATING' THEN next_attempt_at END,
    updated_at = clock_timestamp()
WHERE id = :saga_id AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
RETURNING id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by,
          error_message, created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at,
          deadline_at, outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch,
          revision;

-- name: claim_due_sagas
-- for: taking the oldest open sagas nobody owns and that are due, with the responses their next steps may need.
-- One writer at a time here, so no row can be locked by another, and one process, so no answer can be lost: the two
-- claim ids go unused. RETURNING has no order: the store sorts. Those that wait for nothing and those whose instant has
-- come are found apart, each by an index of its own, so that what is still parked is not looked at. INDEXED BY: left to
-- itself the planner takes the index on status, and with it every open saga.
UPDATE saga_states SET owner = :worker_id, epoch = epoch + 1, claim_id = :claim_id, updated_at = clock_timestamp()
WHERE :lost_claim_ids IS NULL AND id IN (
    SELECT id
    FROM (
        SELECT id, created_at
        FROM (
            SELECT id, created_at
            FROM saga_states INDEXED BY idx_saga_states_claimable
            WHERE owner IS NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING') AND next_attempt_at IS NULL
            ORDER BY created_at, id
            LIMIT :limit
        )
        UNION ALL
        SELECT id, created_at
        FROM (
            SELECT id, created_at
            FROM saga_states INDEXED BY idx_saga_states_parked
            WHERE owner IS NULL
              AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
              AND next_attempt_at <= (SELECT coalesce(:now, clock_timestamp()))
            ORDER BY next_attempt_at
            LIMIT max(:limit, 1000)
        )
    )
    ORDER BY created_at, id
    LIMIT :limit
)
RETURNING id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by,
          error_message, created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at,
          deadline_at, outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch,
          revision,
          max(0.0, coalesce(seconds_between(coalesce(:now, clock_timestamp()), next_attempt_at), 0.0)) AS due_in_secs,
          seconds_between(coalesce(:now, clock_timestamp()), deadline_at) AS deadline_in_secs,
          (SELECT json_group_object(l.step_name, json(l.response_payload))
           FROM saga_step_logs AS l
           WHERE l.saga_id = saga_states.id AND l.action = 'EXECUTE' AND l.status = 'SUCCESS') AS responses;

-- name: open_sagas_of_worker
-- for: what a worker owns, to be held against what it runs. idx_saga_states_owner.
SELECT id, workflow_name, workflow_version, current_step, status, payload, correlation_id, initiated_by, error_message,
       created_at, updated_at, compensation_failed, cancel_requested, attempt, next_attempt_at, deadline_at,
       outcome_unknown, undo_plan, undo_failed, undo_corrections, traceparent, tracestate, owner, epoch, revision
FROM saga_states
WHERE owner = :worker_id AND status IN ('STARTED', 'RUNNING', 'COMPENSATING');

-- name: release_if_owned
-- for: giving one saga up; an earlier wake-up time stays unless a new one is given. The revision stays: only a move
-- raises it, by which a move that is sent again knows itself.
UPDATE saga_states SET
    owner = NULL,
    outcome_unknown = outcome_unknown OR :interrupted,
    next_attempt_at = coalesce(after_secs(coalesce(:now, clock_timestamp()), :retry_in_secs), next_attempt_at),
    updated_at = clock_timestamp()
WHERE id = :saga_id AND owner = :owner AND epoch = :epoch
  AND status IN ('STARTED', 'RUNNING', 'COMPENSATING')
RETURNING id;
