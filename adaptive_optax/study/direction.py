"""Which metrics are better: the only place that knows whether a study minimises or maximises."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

Metric = TypeVar("Metric", float, np.ndarray)


class Direction(NamedTuple):
    """Whether lower or higher metrics are better.

    Tables, pictures and sentences show the metric in the user's own units; comparisons use its `cost`.

    Attributes:
        maximize: Whether higher is better, as for an accuracy.
    """

    maximize: bool = False

    def cost(self, metric: Metric) -> Metric:
        """The metric, negated if higher is better, so that a lower cost is always better."""
        return -metric if self.maximize else metric

    def worst(self, metrics: np.ndarray) -> float:
        """The worst of some metrics, ignoring NaNs; NaN if there are no others."""
        costs = self.cost(np.asarray(metrics, float))
        costs = costs[~np.isnan(costs)]
        return float(self.cost(costs.max())) if costs.size else float("nan")

    @property
    def better(self) -> str:
        """Which metrics are better, in a word: "lower" or "higher"."""
        return "higher" if self.maximize else "lower"


MINIMIZE = Direction()
