"""Whole recipes: tuned runs, ensembles and students of one corpus, and a report of them."""
