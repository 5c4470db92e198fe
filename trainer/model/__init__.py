"""Models: built from a `transformers` configuration, initialized the same on any number of ranks."""
