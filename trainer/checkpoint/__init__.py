"""Checkpoints: immutable generations, verified before they are believed."""
