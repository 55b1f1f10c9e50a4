DROP TABLE saga.saga_step_logs;
DROP TABLE saga.saga_states;
DROP FUNCTION saga.set_updated_at();
