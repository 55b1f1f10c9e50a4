-- What has been applied. The runner keeps this table itself, below the first migration.

-- name: lock_migrations
-- for: one migrating process at a time, to the end of the session. The number means nothing; it must not change.
-- only here: SQLite has one lock, which BEGIN IMMEDIATE takes.
SELECT pg_advisory_lock(7241003915);

-- name: create_saga_schema
-- for: the first run on a database.
-- only here: SQLite has no schemas.
CREATE SCHEMA IF NOT EXISTS saga;

-- name: create_schema_migrations
-- for: the first run on a database.
CREATE TABLE IF NOT EXISTS saga.schema_migrations (
    version    INT         PRIMARY KEY,
    name       TEXT        NOT NULL,
    checksum   TEXT        NOT NULL,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT NOW()
);

-- name: schema_migrations_exist
-- for: asking what was applied without changing anything.
SELECT to_regclass('saga.schema_migrations') IS NOT NULL;

-- name: applied_migrations
-- for: comparing what was applied with the files at hand.
SELECT version, name, checksum, applied_at FROM saga.schema_migrations ORDER BY version;

-- name: workers_exist
-- for: count_live_workers, where migrations have not come that far.
-- only here: an embedded database is locked by the process that has it.
SELECT to_regclass('saga.workers') IS NOT NULL;

-- name: count_live_workers
-- for: taking nothing back under workers that run on it.
-- only here: an embedded database is locked by the process that has it.
SELECT count(*) FROM saga.workers WHERE lease_until >= clock_timestamp();

-- name: add_migration
-- for: noting one that was applied, in its transaction.
INSERT INTO saga.schema_migrations (version, name, checksum) VALUES (:version, :name, :checksum);

-- name: remove_migration
-- for: noting one that was taken back, in its transaction.
DELETE FROM saga.schema_migrations WHERE version = :version;
