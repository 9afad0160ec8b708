"""Transformations: one algorithm a file, each with its state and its mathematics."""
