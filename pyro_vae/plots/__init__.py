"""Figures of data and of pairs."""
