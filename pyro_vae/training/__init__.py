"""Objectives, the engine, and `fit`."""
