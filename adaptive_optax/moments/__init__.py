"""Moments: moving averages of a statistic of the gradient, at any granularity and in any storage."""
