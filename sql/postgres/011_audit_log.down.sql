-- All entries go with it: an operator who steps down so far has copied them elsewhere.
DROP TABLE saga.audit_log;
DROP FUNCTION saga.refuse_audit_change();
