"""Scaling laws: power-law fits with intervals, nested limits, data efficiency, and the search on a lattice of recipes."""
