DROP INDEX saga.idx_saga_states_parked;
DROP INDEX saga.idx_saga_states_claimable;
CREATE INDEX idx_saga_states_claimable ON saga.saga_states (created_at, id)
    WHERE owner IS NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING');
