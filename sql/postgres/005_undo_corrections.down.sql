ALTER TABLE saga.saga_states DROP COLUMN undo_corrections;
