-- Workflow definitions.

-- name: register_workflow_if_changed
-- for: version n+1, if the definition differs from the newest of its name. No row: it does not differ.
INSERT INTO workflow_definitions (name, version, definition, source, created_at)
SELECT :name, coalesce((SELECT max(version) FROM workflow_definitions WHERE name = :name), 0) + 1, :definition,
       :source, clock_timestamp()
WHERE NOT EXISTS (
    SELECT 1
    FROM workflow_definitions AS newest
    WHERE newest.name = :name
      AND newest.version = (SELECT max(version) FROM workflow_definitions WHERE name = :name)
      AND newest.definition = :definition
)
ON CONFLICT DO NOTHING
RETURNING version;

-- name: workflow
-- for: one version, or the newest where :version is NULL.
SELECT version, definition
FROM workflow_definitions
WHERE name = :name AND (:version IS NULL OR version = :version)
ORDER BY version DESC
LIMIT 1;

-- name: workflows
-- for: the newest version of each, by name.
SELECT w.version, w.definition
FROM workflow_definitions AS w
WHERE w.version = (SELECT max(n.version) FROM workflow_definitions AS n WHERE n.name = w.name)
ORDER BY w.name;
