"""Several runs as one predictor: the manifest of its members, its losses for every subset of them, curves over their number."""
