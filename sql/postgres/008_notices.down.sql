DROP TRIGGER workflow_definitions_tell_added ON saga.workflow_definitions;
DROP TRIGGER saga_states_tell_cancel ON saga.saga_states;
DROP TRIGGER saga_states_tell_freed ON saga.saga_states;
DROP TRIGGER saga_states_tell_created ON saga.saga_states;
DROP FUNCTION saga.tell_workflow_added();
DROP FUNCTION saga.tell_cancel_accepted();
DROP FUNCTION saga.tell_sagas_due();
