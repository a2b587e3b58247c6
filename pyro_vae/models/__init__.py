"""Pairs that are ready to use."""
