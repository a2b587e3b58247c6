"""Diagnostics: whether the inference is reliable."""
