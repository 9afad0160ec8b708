"""Choosing an arm's peak rate: the lowest mean, on a grid that grows where the best lies on its edge."""

from __future__ import annotations

import math
from collections.abc import Mapping

RATIO_OF_ONE = math.sqrt(10.0)  # between neighbours, where a grid was given as a single rate


class Grid:
    """The peak rates of one arm.

    Args:
        given: The rates that were asked for, ascending.
        growth: How many may be added on either side.
    """

    def __init__(self, given: list[float], growth: int):
        self.rates, self.growth = list(given), growth
        self.below: list[float] = []
        self.above: list[float] = []

    @property
    def grown(self) -> list[float]:
        """The rates that were added, ascending."""
        return sorted(self.below + self.above)

    def best(self, metric: Mapping[float, float]) -> float:
        """The rate with the lowest mean metric; the lowest such rate at a tie."""
        return min(self.rates, key=lambda rate: (metric[rate], rate))

    def on_edge(self, metric: Mapping[float, float]) -> bool:
        """Whether a better rate may lie beyond the grid."""
        return self.best(metric) in (self.rates[0], self.rates[-1])

    def extend(self, metric: Mapping[float, float]) -> list[float]:
        """Adds a rate on the side where the best one lies on the edge; gives what was added."""
        best, added = self.best(metric), []
        if best == self.rates[0] and len(self.below) < self.growth:
            self.below.append(_rounded(self.rates[0] / _ratio(self.rates[:3])))
            added.append(self.below[-1])
        if best == self.rates[-1] and len(self.above) < self.growth:
            self.above.append(_rounded(self.rates[-1] * _ratio(self.rates[:-4:-1])))
            added.append(self.above[-1])
        self.rates = sorted(self.rates + added)
        return added


def _ratio(edge: list[float]) -> float:
    """The ratio with which a grid goes on, from its last rates, outermost first: 1, 3, 10 goes on with 30."""
    if len(edge) == 1:
        return RATIO_OF_ONE
    inner, outer = edge[-1], edge[-2]
    return max(inner / outer, outer / inner)


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")  # 0.3 and not 0.30000000000000004
