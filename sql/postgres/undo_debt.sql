-- What is still to be undone.

-- name: undo_debt
-- for: by workflow, how many compensations have failed and how many are still to come, and since when the oldest is
-- owed. A step without a compensation owes nothing, wherever in the plan it stands. idx_saga_states_undo_since: a
-- range with two ends is taken for narrow also where the table was never analysed.
WITH owing AS MATERIALIZED (
    SELECT workflow_name, workflow_version, undo_plan, undo_failed, undo_since
    FROM saga.saga_states
    WHERE undo_since BETWEEN '-infinity' AND 'infinity'
)
SELECT s.workflow_name,
       sum(jsonb_array_length(s.undo_failed))::bigint AS failed,
       sum((
           SELECT count(*)
           FROM jsonb_array_elements_text(s.undo_plan) AS planned (step)
           WHERE d.definition IS NULL OR d.definition -> 'steps' -> planned.step::int ->> 'compensate' IS NOT NULL
       ))::bigint AS pending,
       greatest(0, extract(epoch FROM coalesce(:now::timestamptz, clock_timestamp()) - min(s.undo_since)))::float8
           AS oldest_secs
FROM owing AS s
LEFT JOIN saga.workflow_definitions AS d ON d.name = s.workflow_name AND d.version = s.workflow_version
GROUP BY s.workflow_name
ORDER BY s.workflow_name;
