-- Every version of every workflow; a saga runs to its end on the version it began with.

CREATE TABLE saga.workflow_definitions (
    name       VARCHAR(255) NOT NULL,
    version    INT          NOT NULL,
    definition JSONB        NOT NULL,
    -- What was sent (YAML), for people to read again.
    source     TEXT         NOT NULL,
    created_at TIMESTAMPTZ  NOT NULL DEFAULT NOW(),
    -- workflow, workflows, register_workflow_if_changed. Promise: two registrations at once get two versions.
    PRIMARY KEY (name, version),
    CONSTRAINT workflow_definitions_version_check CHECK (version >= 1)
);
