ALTER TABLE saga_states DROP COLUMN tracestate;
