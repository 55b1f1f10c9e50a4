ALTER TABLE saga_states DROP COLUMN undo_corrections;
