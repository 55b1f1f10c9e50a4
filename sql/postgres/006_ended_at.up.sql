-- When a saga ended, for its removal. A column of its own and not updated_at, which every move changes: an index on that
-- would cost each of them a new entry in every index (no update could stay in its page, HOT).

ALTER TABLE saga.saga_states ADD COLUMN ended_at TIMESTAMPTZ;

-- Of sagas that ended before there was the column, the last change is the end. The trigger would make it today.
ALTER TABLE saga.saga_states DISABLE TRIGGER saga_states_set_updated_at;
UPDATE saga.saga_states SET ended_at = updated_at WHERE status IN ('COMPLETED', 'FAILED', 'CANCELLED');
ALTER TABLE saga.saga_states ENABLE TRIGGER saga_states_set_updated_at;

-- Promise: only a saga that is over has ended, and removal never meets one that is not.
ALTER TABLE saga.saga_states ADD CONSTRAINT saga_states_ended_check
    CHECK (ended_at IS NULL OR status IN ('COMPLETED', 'FAILED', 'CANCELLED'));

-- remove_ended_sagas: longest ended first.
CREATE INDEX idx_saga_states_ended_at ON saga.saga_states (ended_at) WHERE ended_at IS NOT NULL;
