"""Models: pairs that are ready to use."""
