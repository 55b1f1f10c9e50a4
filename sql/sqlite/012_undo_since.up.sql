-- Since when a saga owes an undo: effects that should be undone and are not (saga.ports.UndoDebt). Set when it begins to
-- compensate, kept while a compensation waits or has failed, a retry of it included, and cleared when nothing is owed.

ALTER TABLE saga_states ADD COLUMN undo_since TEXT;

-- Of sagas that owed before there was the column, the last change is what is known.
UPDATE saga_states SET undo_since = coalesce(ended_at, updated_at)
WHERE status = 'COMPENSATING' OR undo_failed <> '[]';

-- undo_debt: the few that owe, however many have ended.
CREATE INDEX idx_saga_states_undo_since ON saga_states (undo_since) WHERE undo_since IS NOT NULL;
