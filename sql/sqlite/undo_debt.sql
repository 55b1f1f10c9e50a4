-- What is still to be undone.

-- name: undo_debt
-- for: by workflow, how many compensations have failed and how many are still to come, and since when the oldest is
-- owed. A step without a compensation owes nothing, wherever in the plan it stands. INDEXED BY: left to itself the
-- planner goes by workflow_name, and with it through every saga.
SELECT s.workflow_name,
       sum(json_array_length(s.undo_failed)) AS failed,
       sum((
           SELECT count(*)
           FROM json_each(s.undo_plan) AS planned
           WHERE d.definition IS NULL
              OR json_extract(d.definition, '$.steps[' || planned.value || '].compensate') IS NOT NULL
       )) AS pending,
       max(0.0, seconds_between(min(s.undo_since), coalesce(:now, clock_timestamp()))) AS oldest_secs
FROM saga_states AS s INDEXED BY idx_saga_states_undo_since
LEFT JOIN workflow_definitions AS d ON d.name = s.workflow_name AND d.version = s.workflow_version
WHERE s.undo_since IS NOT NULL
GROUP BY s.workflow_name
ORDER BY s.workflow_name;
