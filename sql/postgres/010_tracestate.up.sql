-- W3C tracestate of whoever started the saga, passed on to participants beside traceparent. NULL: none came. Nullable
-- without a default, so that no row is rewritten.

ALTER TABLE saga.saga_states ADD COLUMN tracestate TEXT;
