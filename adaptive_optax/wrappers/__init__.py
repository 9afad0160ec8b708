"""Transformations that wrap another transformation."""
