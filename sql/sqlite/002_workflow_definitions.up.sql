-- Every version of every workflow; a saga runs to its end on the version it began with.

CREATE TABLE workflow_definitions (
    name       TEXT    NOT NULL CHECK (length(name) <= 255),
    version    INTEGER NOT NULL,
    definition TEXT    NOT NULL CHECK (json_valid(definition)),
    -- What was sent (YAML), for people to read again.
    source     TEXT    NOT NULL,
    created_at TEXT    NOT NULL,
    -- workflow, workflows, register_workflow_if_changed. Promise: two registrations at once get two versions.
    PRIMARY KEY (name, version),
    CONSTRAINT workflow_definitions_version_check CHECK (version >= 1)
) STRICT;
