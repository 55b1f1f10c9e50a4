DROP INDEX idx_saga_states_undo_since;
ALTER TABLE saga_states DROP COLUMN undo_since;
