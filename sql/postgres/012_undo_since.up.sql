-- Since when a saga owes an undo: effects that should be undone and are not (saga.ports.UndoDebt). Set when it begins to
-- compensate, kept while a compensation waits or has failed, a retry of it included, and cleared when nothing is owed.
-- A column of its own and not updated_at, as ended_at is (006): it changes twice in a saga's life.

ALTER TABLE saga.saga_states ADD COLUMN undo_since TIMESTAMPTZ;

-- Of sagas that owed before there was the column, the last change is what is known. The trigger would make it today.
ALTER TABLE saga.saga_states DISABLE TRIGGER saga_states_set_updated_at;
UPDATE saga.saga_states SET undo_since = coalesce(ended_at, updated_at)
WHERE status = 'COMPENSATING' OR undo_failed <> '[]';
ALTER TABLE saga.saga_states ENABLE TRIGGER saga_states_set_updated_at;

-- undo_debt: the few that owe, however many have ended.
CREATE INDEX idx_saga_states_undo_since ON saga.saga_states (undo_since) WHERE undo_since IS NOT NULL;
