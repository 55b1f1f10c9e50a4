-- What an operator corrects about compensations that failed, kept until each of them has ended (saga.model.UndoCorrection
-- by step index). NULL, as almost always: nothing.

ALTER TABLE saga_states ADD COLUMN undo_corrections TEXT
    CHECK (undo_corrections IS NULL OR json_valid(undo_corrections));
