-- The index goes with its column.
ALTER TABLE saga.saga_states DROP COLUMN undo_since;
