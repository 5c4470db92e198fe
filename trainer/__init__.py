"""Orthogon's trainer: what runs on every rank."""
