-- What has been applied. The runner keeps this table itself, below the first migration.

-- name: create_schema_migrations
-- for: the first run on a database.
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    INTEGER NOT NULL PRIMARY KEY,
    name       TEXT    NOT NULL,
    checksum   TEXT    NOT NULL,
    applied_at TEXT    NOT NULL
) STRICT;

-- name: schema_migrations_exist
-- for: asking what was applied without changing anything.
SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'schema_migrations');

-- name: applied_migrations
-- for: comparing what was applied with the files at hand.
SELECT version, name, checksum, applied_at FROM schema_migrations ORDER BY version;

-- name: add_migration
-- for: noting one that was applied, in its transaction.
INSERT INTO schema_migrations (version, name, checksum, applied_at)
VALUES (:version, :name, :checksum, clock_timestamp());

-- name: remove_migration
-- for: noting one that was taken back, in its transaction.
DELETE FROM schema_migrations WHERE version = :version;
