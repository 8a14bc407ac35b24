"""What a run has logged as JSON arrays, and the table that keeps them of runs that have ended.

A page of 1,000 runs with 20 metrics and 20 params each is 40,000 rows of three tables: reading them takes half a second, the arrays 30 ms.
They are MLflow's wire format, as `entrypoints.mlflow` has it: whoever changes one changes the other. A run that has ended is rarely logged
to again: new metrics or params drop its row, which its next end makes anew, and new tags are put into it, since people tag finished runs.
"""

from __future__ import annotations

from sqlalchemy import text

# to_json writes NaN and the infinities as texts, which is what the wire has.
METRICS = """
    coalesce((SELECT '[' || string_agg('{"key":' || to_json(key) || ',"value":' || to_json(value) || ',"timestamp":' || timestamp_ms
        || ',"step":' || step || '}', ',' ORDER BY key) || ']' FROM tracker.metric_latest AS own WHERE own.run_id = run.run_id), '[]')"""

_TEXTS = """
    coalesce((SELECT '[' || string_agg('{"key":' || to_json(key) || ',"value":' || to_json(value) || '}', ',' ORDER BY key) || ']'
        FROM tracker.%s AS own WHERE own.run_id = run.run_id), '[]')"""

PARAMS = _TEXTS % "param"
TAGS = _TEXTS % "tag"
"""Expressions: the arrays of the row `run`, from what is stored."""

KEEP_WHOLE = text(
    f"""
    INSERT INTO tracker.run_logged (run_id, metrics, params, tags)
    SELECT run.run_id, {METRICS}, {PARAMS}, {TAGS} FROM tracker.run WHERE run.run_id = :run_id
    ON CONFLICT (run_id) DO UPDATE SET metrics = excluded.metrics, params = excluded.params, tags = excluded.tags
    """  # noqa: S608 - of constants
)
"""Keeps what a run has logged. The run must be held against writers."""

TAGS_ANEW = text(f"UPDATE tracker.run_logged AS run SET tags = {TAGS} WHERE run_id = :run_id")  # noqa: S608 - of constants
"""Puts the run's tags into what is kept of it, whose row must be held since before the tags were changed."""
