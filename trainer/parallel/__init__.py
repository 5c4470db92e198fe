"""Strategies that spread a model over ranks: one file each."""
