-- Who runs sagas now, and until when each may believe so. A handful of rows: no index but the key.

CREATE TABLE workers (
    id          TEXT NOT NULL PRIMARY KEY CHECK (length(id) <= 255),
    started_at  TEXT NOT NULL,
    lease_until TEXT NOT NULL
) STRICT;
