-- What is still to be undone.

-- name: undo_debt
-- for: by workflow, how many compensations have failed and how many are still to come, and since when the oldest is
-- owed. A step without a compensation owes nothing, wherever in the plan it stands. idx_saga_states_undo_since; LIMIT 1
-- keeps the planner from joining whole tables.
SELECT s.workflow_name,
       sum(jsonb_array_length(s.undo_failed))::bigint AS failed,
       sum((
           SELECT count(*)
           FROM jsonb_array_elements_text(s.undo_plan) AS planned (step)
           WHERE d.definition IS NULL OR d.definition -> 'steps' -> planned.step::int ->> 'compensate' IS NOT NULL
       ))::bigint AS pending,
       greatest(0, extract(epoch FROM coalesce(:now::timestamptz, clock_timestamp()) - min(s.undo_since)))::float8
           AS oldest_secs
FROM saga.saga_states AS s
LEFT JOIN LATERAL (
    SELECT definition
    FROM saga.workflow_definitions
    WHERE name = s.workflow_name AND version = s.workflow_version
    LIMIT 1
) AS d ON true
WHERE s.undo_since IS NOT NULL
GROUP BY s.workflow_name
ORDER BY s.workflow_name;
