-- Who runs sagas now, and until when each may believe so. A handful of rows: no index but the key.

CREATE TABLE saga.workers (
    id          VARCHAR(255) PRIMARY KEY,
    started_at  TIMESTAMPTZ  NOT NULL DEFAULT NOW(),
    lease_until TIMESTAMPTZ  NOT NULL
);
