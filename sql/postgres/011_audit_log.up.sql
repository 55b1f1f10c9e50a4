-- Who asked for which change, kept beside the sagas and longer than they are.

CREATE TABLE saga.audit_log (
    id               BIGINT      NOT NULL GENERATED ALWAYS AS IDENTITY,
    created_at       TIMESTAMPTZ NOT NULL,
    action           TEXT        NOT NULL,
    outcome          TEXT        NOT NULL DEFAULT 'DONE',
    principal        TEXT        NOT NULL,
    -- A list of words; what no role here means is not in it.
    roles            TEXT        NOT NULL,
    address          TEXT,
    request_id       TEXT,
    door             TEXT        NOT NULL,
    -- No foreign keys: an entry outlives the saga and says of a refused request what it named.
    saga_id          UUID,
    workflow_name    TEXT,
    workflow_version INT,
    step_name        TEXT,
    reason           TEXT,
    -- What the change was from and to, small: status, revision, version; never a payload.
    state_before     JSONB,
    state_after      JSONB,
    -- list_audit: newest first, continued behind a cursor; remove_audit_before: oldest first.
    PRIMARY KEY (created_at, id),
    -- Promise: no word outside saga.audit.AuditAction.
    CONSTRAINT audit_log_action_check
        CHECK (action IN ('START_SAGA', 'CANCEL_SAGA', 'RETRY_COMPENSATION', 'CORRECT_COMPENSATION', 'MARK_DONE',
                          'REGISTER_WORKFLOW')),
    -- Promise: no word outside saga.audit.AuditOutcome.
    CONSTRAINT audit_log_outcome_check CHECK (outcome IN ('DONE', 'DENIED')),
    -- Promise: no word outside saga.audit.Door.
    CONSTRAINT audit_log_door_check CHECK (door IN ('REST', 'GRPC', 'PROCESS'))
);

-- list_audit_of_saga: the few entries of one saga.
CREATE INDEX idx_audit_log_saga_id ON saga.audit_log (saga_id, created_at, id) WHERE saga_id IS NOT NULL;
-- list_audit by principal.
CREATE INDEX idx_audit_log_principal ON saga.audit_log (principal, created_at, id);
-- list_audit by action. Starts are nearly all there is: a list of them goes by the primary key.
CREATE INDEX idx_audit_log_action ON saga.audit_log (action, created_at, id) WHERE action <> 'START_SAGA';

CREATE FUNCTION saga.refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- remove_audit_before says, for its own transaction, how old an entry must be to go.
    IF TG_OP = 'DELETE'
        AND OLD.created_at < nullif(current_setting('saga.audit_removing_before', true), '')::timestamptz
    THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'saga.audit_log is append-only: % refused', TG_OP;
END;
$$;

-- Promise: what was entered stays as it is.
CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE ON saga.audit_log
    FOR EACH ROW EXECUTE FUNCTION saga.refuse_audit_change();
CREATE TRIGGER audit_log_never_truncated BEFORE TRUNCATE ON saga.audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION saga.refuse_audit_change();
