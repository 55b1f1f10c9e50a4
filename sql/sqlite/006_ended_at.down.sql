DROP INDEX idx_saga_states_ended_at;
ALTER TABLE saga_states DROP COLUMN ended_at;
