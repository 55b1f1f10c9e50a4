-- W3C tracestate of whoever started the saga, passed on to participants beside traceparent. NULL: none came.

ALTER TABLE saga_states ADD COLUMN tracestate TEXT;
