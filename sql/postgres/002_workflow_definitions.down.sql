DROP TABLE saga.workflow_definitions;
