-- Who asked for which change, kept beside the sagas and longer than they are.

CREATE TABLE audit_log (
    -- AUTOINCREMENT: the number of an entry that was removed is not given again.
    id               INTEGER PRIMARY KEY AUTOINCREMENT,
    created_at       TEXT    NOT NULL,
    action           TEXT    NOT NULL,
    outcome          TEXT    NOT NULL DEFAULT 'DONE',
    principal        TEXT    NOT NULL,
    -- A list of words; what no role here means is not in it.
    roles            TEXT    NOT NULL,
    address          TEXT,
    request_id       TEXT,
    door             TEXT    NOT NULL,
    -- No foreign keys: an entry outlives the saga and says of a refused request what it named.
    saga_id          TEXT,
    workflow_name    TEXT,
    workflow_version INTEGER,
    step_name        TEXT,
    reason           TEXT,
    -- What the change was from and to, small: status, revision, version; never a payload.
    state_before     TEXT,
    state_after      TEXT,
    -- Promise: no word outside saga.audit.AuditAction.
    CONSTRAINT audit_log_action_check
        CHECK (action IN ('START_SAGA', 'CANCEL_SAGA', 'RETRY_COMPENSATION', 'CORRECT_COMPENSATION', 'MARK_DONE',
                          'REGISTER_WORKFLOW')),
    -- Promise: no word outside saga.audit.AuditOutcome.
    CONSTRAINT audit_log_outcome_check CHECK (outcome IN ('DONE', 'DENIED')),
    -- Promise: no word outside saga.audit.Door.
    CONSTRAINT audit_log_door_check CHECK (door IN ('REST', 'GRPC', 'PROCESS'))
) STRICT;

-- list_audit: newest first, continued behind a cursor; remove_audit_before: oldest first.
CREATE INDEX idx_audit_log_created_at ON audit_log (created_at, id);
-- list_audit_of_saga: the few entries of one saga.
CREATE INDEX idx_audit_log_saga_id ON audit_log (saga_id, created_at, id) WHERE saga_id IS NOT NULL;

-- How old an entry must be to go: one row, without an instant but within a transaction of remove_audit_before.
CREATE TABLE audit_removal (
    id              INTEGER PRIMARY KEY CHECK (id = 1),
    removing_before TEXT
) STRICT;
INSERT INTO audit_removal (id) VALUES (1);

-- Promise: what was entered stays as it is.
CREATE TRIGGER audit_log_never_updated BEFORE UPDATE ON audit_log
BEGIN
    SELECT RAISE(ABORT, 'audit_log is append-only: UPDATE refused');
END;
CREATE TRIGGER audit_log_append_only BEFORE DELETE ON audit_log
WHEN NOT EXISTS (SELECT 1 FROM audit_removal WHERE OLD.created_at < removing_before)
BEGIN
    SELECT RAISE(ABORT, 'audit_log is append-only: DELETE refused');
END;
-- INSERT OR REPLACE takes the old row away without asking the trigger above.
CREATE TRIGGER audit_log_never_replaced BEFORE INSERT ON audit_log
WHEN EXISTS (SELECT 1 FROM audit_log WHERE id = NEW.id)
BEGIN
    SELECT RAISE(ABORT, 'audit_log is append-only: REPLACE refused');
END;
