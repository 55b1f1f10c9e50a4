ALTER TABLE saga.saga_states DROP COLUMN tracestate;
