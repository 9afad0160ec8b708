"""Benchmarks; run one with `python -m benchmarks --suite NAME`."""
