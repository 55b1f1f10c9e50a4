-- The log of steps. Written by record_moves.

-- name: step_logs
-- for: the history of one saga, oldest first.
SELECT id, saga_id, step_index, step_name, action, status, request_payload, response_payload, error_message,
       started_at, completed_at, attempts
FROM saga.saga_step_logs
WHERE saga_id = :saga_id::uuid
ORDER BY seq;
