"""Other places that show a run's history: one file each. They read what `metrics.jsonl` says and never write it."""
