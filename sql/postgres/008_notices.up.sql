-- What workers tell each other the moment it commits, so that the poll behind it need not be quick (saga.ports.Notice).
-- Triggers and not part of the queries: whoever frees a saga or asks for its cancellation, a person at a prompt too,
-- cannot leave the notice out, and a move that none is due for pays for one comparison.

CREATE FUNCTION saga.tell_sagas_due() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- Equal notices of one transaction are sent once.
    PERFORM pg_notify('saga_notices', '{"type":"due"}');
    RETURN NULL;
END;
$$;

CREATE FUNCTION saga.tell_cancel_accepted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify(
        'saga_notices', jsonb_build_object('type', 'cancel', 'saga_id', NEW.id, 'owner', NEW.owner)::text
    );
    RETURN NULL;
END;
$$;

CREATE FUNCTION saga.tell_workflow_added() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('saga_notices', jsonb_build_object('type', 'workflow', 'name', NEW.name)::text);
    RETURN NULL;
END;
$$;

-- A saga that was accepted by a worker without room.
CREATE TRIGGER saga_states_tell_created AFTER INSERT ON saga.saga_states
    FOR EACH ROW WHEN (NEW.owner IS NULL AND NEW.status = 'STARTED')
    EXECUTE FUNCTION saga.tell_sagas_due();

-- A saga that can be claimed now and could not before: freed, cancelled while it was parked, or opened again. One that
-- is freed to wait (parked) is nobody's business yet.
CREATE TRIGGER saga_states_tell_freed AFTER UPDATE ON saga.saga_states
    FOR EACH ROW WHEN (
        NEW.owner IS NULL
        AND NEW.status IN ('STARTED', 'RUNNING', 'COMPENSATING')
        AND (NEW.next_attempt_at IS NULL OR NEW.next_attempt_at <= clock_timestamp())
        AND (
            OLD.owner IS NOT NULL
            OR OLD.status NOT IN ('STARTED', 'RUNNING', 'COMPENSATING')
            OR OLD.next_attempt_at IS DISTINCT FROM NEW.next_attempt_at
        )
    )
    EXECUTE FUNCTION saga.tell_sagas_due();

-- A cancel request that reaches a saga somebody runs. OF: moves never write that column, and so never come here.
CREATE TRIGGER saga_states_tell_cancel AFTER UPDATE OF cancel_requested ON saga.saga_states
    FOR EACH ROW WHEN (NEW.cancel_requested AND NOT OLD.cancel_requested AND NEW.owner IS NOT NULL)
    EXECUTE FUNCTION saga.tell_cancel_accepted();

CREATE TRIGGER workflow_definitions_tell_added AFTER INSERT ON saga.workflow_definitions
    FOR EACH ROW EXECUTE FUNCTION saga.tell_workflow_added();
