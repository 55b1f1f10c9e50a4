-- A claim passed over every parked saga that was older than the due ones. Two indexes instead of one: what waits for a
-- worker, oldest first, and what waits for an instant, soonest first.

-- claim_due_sagas: open sagas that nobody owns and that are parked, soonest due first.
CREATE INDEX idx_saga_states_parked ON saga.saga_states (next_attempt_at)
    WHERE owner IS NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING') AND next_attempt_at IS NOT NULL;
DROP INDEX saga.idx_saga_states_claimable;
-- claim_due_sagas: open sagas that nobody owns and that wait for nothing, oldest first.
CREATE INDEX idx_saga_states_claimable ON saga.saga_states (created_at, id)
    WHERE owner IS NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING') AND next_attempt_at IS NULL;
