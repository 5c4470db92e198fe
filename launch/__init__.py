"""Orthogon's launcher: what runs where there is no GPU. Never imports torch."""
