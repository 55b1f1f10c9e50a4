-- Workflow definitions.

-- name: register_workflow_if_changed
-- for: version n+1, if the definition differs from the newest of its name. No row: it does not differ, or another
-- process added the same version at this moment (the store asks again).
INSERT INTO saga.workflow_definitions (name, version, definition, source)
SELECT :name::text, coalesce((SELECT max(version) FROM saga.workflow_definitions WHERE name = :name), 0) + 1,
       :definition::text::jsonb, :source::text
WHERE NOT EXISTS (
    SELECT 1
    FROM saga.workflow_definitions AS newest
    WHERE newest.name = :name
      AND newest.version = (SELECT max(version) FROM saga.workflow_definitions WHERE name = :name)
      AND newest.definition = :definition::jsonb
)
ON CONFLICT DO NOTHING
RETURNING version;

-- name: workflow
-- for: one version, or the newest where :version is NULL.
SELECT version, definition
FROM saga.workflow_definitions
WHERE name = :name::text AND (:version::int IS NULL OR version = :version)
ORDER BY version DESC
LIMIT 1;

-- name: workflows
-- for: the newest version of each, by name.
SELECT w.version, w.definition
FROM saga.workflow_definitions AS w
WHERE w.version = (SELECT max(n.version) FROM saga.workflow_definitions AS n WHERE n.name = w.name)
-- By bytes, as SQLite orders, whatever the locale of the database.
ORDER BY w.name COLLATE "C";
