ALTER TABLE saga.saga_states DROP COLUMN ended_at;
