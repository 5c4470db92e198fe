"""Places a run can go: one file each."""
