"""Transformations: one algorithm per file, with its state and its equations."""
