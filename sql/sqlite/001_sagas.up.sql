-- Sagas and the log of their steps. Instants are RFC 3339 text, UTC, microseconds, 'Z': they sort as they follow.
-- VARCHAR(255) of the other dialect is a CHECK on the length here.

CREATE TABLE saga_states (
    id                  TEXT    NOT NULL PRIMARY KEY,
    workflow_name       TEXT    NOT NULL CHECK (length(workflow_name) <= 255),
    current_step        INTEGER NOT NULL DEFAULT 0,
    status              TEXT    NOT NULL DEFAULT 'STARTED',
    payload             TEXT    CHECK (payload IS NULL OR json_valid(payload)),
    correlation_id      TEXT    CHECK (length(correlation_id) <= 255),
    initiated_by        TEXT    CHECK (length(initiated_by) <= 255),
    error_message       TEXT,
    created_at          TEXT    NOT NULL,
    -- Set by every query that updates: a trigger, which SQLite runs after the row, would write each row twice.
    updated_at          TEXT    NOT NULL,
    workflow_version    INTEGER NOT NULL,
    compensation_failed INTEGER NOT NULL DEFAULT 0 CHECK (compensation_failed IN (0, 1)),
    cancel_requested    INTEGER NOT NULL DEFAULT 0 CHECK (cancel_requested IN (0, 1)),
    attempt             INTEGER NOT NULL DEFAULT 0,
    next_attempt_at     TEXT,
    deadline_at         TEXT,
    outcome_unknown     INTEGER NOT NULL DEFAULT 0 CHECK (outcome_unknown IN (0, 1)),
    undo_plan           TEXT    NOT NULL DEFAULT '[]' CHECK (json_valid(undo_plan)),
    undo_failed         TEXT    NOT NULL DEFAULT '[]' CHECK (json_valid(undo_failed)),
    traceparent         TEXT,
    owner               TEXT    CHECK (length(owner) <= 255),
    epoch               INTEGER NOT NULL DEFAULT 0,
    -- Of the other dialect, where the answer to a claim can be lost; always NULL here.
    claim_id            TEXT,
    revision            INTEGER NOT NULL DEFAULT 0,
    idempotency_key     TEXT    CHECK (length(idempotency_key) <= 255),
    request_digest      TEXT,
    -- Promise: no state outside the six of saga.model.SagaStatus.
    CONSTRAINT saga_states_status_check
        CHECK (status IN ('STARTED', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    -- Promise: counters never run backwards past their start, and stay what the other dialect can hold.
    CONSTRAINT saga_states_counters_check
        CHECK (current_step BETWEEN 0 AND 2147483647 AND attempt BETWEEN 0 AND 2147483647
               AND epoch BETWEEN 0 AND 2147483647 AND revision BETWEEN 0 AND 2147483647),
    -- Promise: a key always comes with what it stood for, so that a second use can be compared.
    CONSTRAINT saga_states_idempotency_check CHECK (idempotency_key IS NULL OR request_digest IS NOT NULL)
) STRICT;

-- list_sagas and count_sagas by workflow_name.
CREATE INDEX idx_saga_states_workflow_name ON saga_states (workflow_name);
-- count_open_sagas; list_sagas and count_sagas by status.
CREATE INDEX idx_saga_states_status ON saga_states (status);
-- list_sagas and count_sagas by correlation_id.
CREATE INDEX idx_saga_states_correlation_id ON saga_states (correlation_id) WHERE correlation_id IS NOT NULL;
-- count_sagas by created_after and created_before.
CREATE INDEX idx_saga_states_created_at ON saga_states (created_at);
-- list_sagas: newest first, continued behind a cursor.
CREATE INDEX idx_saga_states_newest_first ON saga_states (created_at DESC, id DESC);
-- claim_due_sagas: oldest first among those nobody owns.
CREATE INDEX idx_saga_states_claimable ON saga_states (created_at, id)
    WHERE owner IS NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING');
-- free_abandoned_sagas and free_sagas_of_worker: open sagas by owner.
CREATE INDEX idx_saga_states_owner ON saga_states (owner)
    WHERE owner IS NOT NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING');
-- list_sagas and count_sagas by compensation_failed: the few an operator has to look at.
CREATE INDEX idx_saga_states_compensation_failed ON saga_states (created_at DESC, id DESC)
    WHERE compensation_failed;
-- create_saga. Promise: one saga for one idempotency key.
CREATE UNIQUE INDEX idx_saga_states_idempotency_key ON saga_states (idempotency_key)
    WHERE idempotency_key IS NOT NULL;

CREATE TABLE saga_step_logs (
    -- The order of writing: two logs may carry the same instant. It is the key because SQLite's own row number is.
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT    NOT NULL UNIQUE,
    saga_id          TEXT    NOT NULL REFERENCES saga_states (id) ON DELETE CASCADE,
    step_index       INTEGER NOT NULL CHECK (step_index BETWEEN 0 AND 2147483647),
    step_name        TEXT    NOT NULL CHECK (length(step_name) <= 255),
    action           TEXT    NOT NULL,
    status           TEXT    NOT NULL,
    request_payload  TEXT    CHECK (request_payload IS NULL OR json_valid(request_payload)),
    response_payload TEXT    CHECK (response_payload IS NULL OR json_valid(response_payload)),
    error_message    TEXT,
    started_at       TEXT    NOT NULL,
    completed_at     TEXT,
    attempts         INTEGER NOT NULL DEFAULT 1,
    -- Promise: the words of saga.model.StepAction and StepStatus, no others.
    CONSTRAINT saga_step_logs_action_check CHECK (action IN ('EXECUTE', 'COMPENSATE')),
    CONSTRAINT saga_step_logs_status_check CHECK (status IN ('SUCCESS', 'FAILED', 'TIMEOUT', 'SKIPPED'))
) STRICT;

-- step_logs and claim_due_sagas: the logs of one saga; and the cascade when a saga is deleted.
CREATE INDEX idx_saga_step_logs_saga_id_step_index ON saga_step_logs (saga_id, step_index);
