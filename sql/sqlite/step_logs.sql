-- The log of steps.

-- name: add_step_log
-- for: one finished action, in the transaction of its move.
-- only here: SQLite has no writing CTEs (there: part of record_moves).
INSERT INTO saga_step_logs (
    id, saga_id, step_index, step_name, action, status, request_payload, response_payload, error_message, started_at,
    completed_at, attempts
) VALUES (
    :id, :saga_id, :step_index, :step_name, :action, :status, :request_payload, :response_payload, :error_message,
    :started_at, :completed_at, :attempts
);

-- name: step_logs
-- for: the history of one saga, oldest first.
SELECT id, saga_id, step_index, step_name, action, status, request_payload, response_payload, error_message,
       started_at, completed_at, attempts
FROM saga_step_logs
WHERE saga_id = :saga_id
ORDER BY seq;
