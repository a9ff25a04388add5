"""What a job shows: results.json, the report, model cards and the table of a run."""
