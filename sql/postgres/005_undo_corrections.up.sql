-- What an operator corrects about compensations that failed, kept until each of them has ended (saga.model.UndoCorrection
-- by step index). NULL, as almost always: nothing. Nullable without a default, so that no row is rewritten.

ALTER TABLE saga.saga_states ADD COLUMN undo_corrections JSONB;
