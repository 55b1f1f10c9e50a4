-- When a saga ended, for its removal.

ALTER TABLE saga_states ADD COLUMN ended_at TEXT
    -- Promise: only a saga that is over has ended, and removal never meets one that is not.
    CONSTRAINT saga_states_ended_check
    CHECK (ended_at IS NULL OR status IN ('COMPLETED', 'FAILED', 'CANCELLED'));

-- Of sagas that ended before there was the column, the last change is the end.
UPDATE saga_states SET ended_at = updated_at WHERE status IN ('COMPLETED', 'FAILED', 'CANCELLED');

-- remove_ended_sagas: longest ended first.
CREATE INDEX idx_saga_states_ended_at ON saga_states (ended_at) WHERE ended_at IS NOT NULL;
