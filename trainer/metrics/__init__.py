"""What a run tells: its history, a progress line, a figure."""
