"""What keeps a run honest: agreed verdicts, signals."""
