-- All entries go with it: an operator who steps down so far has copied them elsewhere.
DROP TABLE audit_log;
DROP TABLE audit_removal;
