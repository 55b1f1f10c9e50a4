-- Sagas and the log of their steps. Lives in schema "saga", which the migration runner has made for its own table.

CREATE TABLE saga.saga_states (
    id                  UUID         PRIMARY KEY DEFAULT gen_random_uuid(),
    workflow_name       VARCHAR(255) NOT NULL,
    current_step        INT          NOT NULL DEFAULT 0,
    status              VARCHAR(50)  NOT NULL DEFAULT 'STARTED',
    payload             JSONB,
    correlation_id      VARCHAR(255),
    initiated_by        VARCHAR(255),
    error_message       TEXT,
    created_at          TIMESTAMPTZ  NOT NULL DEFAULT NOW(),
    updated_at          TIMESTAMPTZ  NOT NULL DEFAULT NOW(),
    workflow_version    INT          NOT NULL,
    compensation_failed BOOLEAN      NOT NULL DEFAULT false,
    cancel_requested    BOOLEAN      NOT NULL DEFAULT false,
    attempt             INT          NOT NULL DEFAULT 0,
    next_attempt_at     TIMESTAMPTZ,
    deadline_at         TIMESTAMPTZ,
    outcome_unknown     BOOLEAN      NOT NULL DEFAULT false,
    undo_plan           JSONB        NOT NULL DEFAULT '[]',
    undo_failed         JSONB        NOT NULL DEFAULT '[]',
    traceparent         TEXT,
    owner               VARCHAR(255),
    epoch               INT          NOT NULL DEFAULT 0,
    -- The claim (or creation) by which the owner got it, so that a claim whose answer was lost can be found again.
    claim_id            UUID,
    revision            INT          NOT NULL DEFAULT 0,
    idempotency_key     VARCHAR(255),
    request_digest      TEXT,
    -- Promise: no state outside the six of saga.model.SagaStatus.
    CONSTRAINT saga_states_status_check
        CHECK (status IN ('STARTED', 'RUNNING', 'COMPENSATING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    -- Promise: counters never run backwards past their start.
    CONSTRAINT saga_states_counters_check
        CHECK (current_step >= 0 AND attempt >= 0 AND epoch >= 0 AND revision >= 0),
    -- Promise: a key always comes with what it stood for, so that a second use can be compared.
    CONSTRAINT saga_states_idempotency_check CHECK (idempotency_key IS NULL OR request_digest IS NOT NULL)
)
-- Most updates (step after step) touch no indexed column; room in each page lets them stay in it (HOT). 80 is a guess.
WITH (fillfactor = 80);

-- list_sagas and count_sagas by workflow_name.
CREATE INDEX idx_saga_states_workflow_name ON saga.saga_states (workflow_name);
-- count_open_sagas; list_sagas and count_sagas by status.
CREATE INDEX idx_saga_states_status ON saga.saga_states (status);
-- list_sagas and count_sagas by correlation_id.
CREATE INDEX idx_saga_states_correlation_id ON saga.saga_states (correlation_id) WHERE correlation_id IS NOT NULL;
-- count_sagas by created_after and created_before.
CREATE INDEX idx_saga_states_created_at ON saga.saga_states (created_at);
-- list_sagas: newest first, continued behind a cursor.
CREATE INDEX idx_saga_states_newest_first ON saga.saga_states (created_at DESC, id DESC);
-- claim_due_sagas: oldest first among those nobody owns.
CREATE INDEX idx_saga_states_claimable ON saga.saga_states (created_at, id)
    WHERE owner IS NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING');
-- free_abandoned_sagas and free_sagas_of_worker: open sagas by owner.
CREATE INDEX idx_saga_states_owner ON saga.saga_states (owner)
    WHERE owner IS NOT NULL AND status IN ('STARTED', 'RUNNING', 'COMPENSATING');
-- list_sagas and count_sagas by compensation_failed: the few an operator has to look at.
CREATE INDEX idx_saga_states_compensation_failed ON saga.saga_states (created_at DESC, id DESC)
    WHERE compensation_failed;
-- create_sagas. Promise: one saga for one idempotency key, also when two requests come at once.
CREATE UNIQUE INDEX idx_saga_states_idempotency_key ON saga.saga_states (idempotency_key)
    WHERE idempotency_key IS NOT NULL;

CREATE FUNCTION saga.set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at = NOW();
    RETURN NEW;
END;
$$;

CREATE TRIGGER saga_states_set_updated_at BEFORE UPDATE ON saga.saga_states
    FOR EACH ROW EXECUTE FUNCTION saga.set_updated_at();

CREATE TABLE saga.saga_step_logs (
    id               UUID         PRIMARY KEY DEFAULT gen_random_uuid(),
    saga_id          UUID         NOT NULL REFERENCES saga.saga_states (id) ON DELETE CASCADE,
    step_index       INT          NOT NULL,
    step_name        VARCHAR(255) NOT NULL,
    action           VARCHAR(50)  NOT NULL,
    status           VARCHAR(50)  NOT NULL,
    request_payload  JSONB,
    response_payload JSONB,
    error_message    TEXT,
    started_at       TIMESTAMPTZ  NOT NULL DEFAULT NOW(),
    completed_at     TIMESTAMPTZ,
    attempts         INT          NOT NULL DEFAULT 1,
    -- The order of writing: two logs may carry the same instant.
    seq              BIGINT       NOT NULL GENERATED ALWAYS AS IDENTITY,
    -- Promise: the words of saga.model.StepAction and StepStatus, no others.
    CONSTRAINT saga_step_logs_action_check CHECK (action IN ('EXECUTE', 'COMPENSATE')),
    CONSTRAINT saga_step_logs_status_check CHECK (status IN ('SUCCESS', 'FAILED', 'TIMEOUT', 'SKIPPED'))
);

-- step_logs and claim_due_sagas: the logs of one saga; and the cascade when a saga is deleted.
CREATE INDEX idx_saga_step_logs_saga_id_step_index ON saga.saga_step_logs (saga_id, step_index);
