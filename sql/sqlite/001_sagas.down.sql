DROP TABLE saga_step_logs;
DROP TABLE saga_states;
