"""Chooses an arm's peak rate: the best mean, on a grid that grows while the best rate is on its edge.

`race` chooses it with fewer trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from adaptive_optax.study.direction import MINIMIZE, Direction
from adaptive_optax.study.statistics.outcomes import judged_metric
from adaptive_optax.study.statistics.paired import mean_and_error

RATIO_OF_ONE = math.sqrt(10.0)  # between neighbours, for a grid given as a single rate


class Grid:
    """The peak rates of one arm.

    Args:
        given: The requested rates, ascending.
        growth: How many rates may be added on either side.
        direction: Which metrics are better.
    """

    def __init__(self, given: list[float], growth: int, direction: Direction = MINIMIZE):
        self.rates: list[float] = list(given)
        self.growth: int = growth
        self.direction: Direction = direction
        self.below: list[float] = []
        self.above: list[float] = []

    @property
    def grown(self) -> list[float]:
        """The added rates, ascending."""
        return sorted(self.below + self.above)

    def best(self, metric: Mapping[float, float]) -> float:
        """The rate with the best mean metric; the lowest such rate at a tie."""
        return min(self.rates, key=lambda rate: (self.direction.cost(metric[rate]), rate))

    def on_edge(self, best: float) -> bool:
        """Whether a rate better than the best one may lie beyond the grid."""
        return best in (self.rates[0], self.rates[-1])

    def extend(self, best: float) -> list[float]:
        """Adds a rate beyond each edge that is the best rate; returns the added rates."""
        added: list[float] = []
        if best == self.rates[0] and len(self.below) < self.growth:
            self.below.append(_rounded(self.rates[0] / _ratio(self.rates[:3])))
            added.append(self.below[-1])
        if best == self.rates[-1] and len(self.above) < self.growth:
            self.above.append(_rounded(self.rates[-1] * _ratio(self.rates[:-4:-1])))
            added.append(self.above[-1])
        self.rates = sorted(self.rates + added)
        return added


class Round(NamedTuple):
    """How far tuning has come.

    Attributes:
        seeds: The number of tuning seeds that the round needs.
        running: The rates that need them, ascending: those that can still win.
        best: The rate that leads so far; None before the first round.
        finished: Whether all trials have been run, so that `best` is the winner.
    """

    seeds: int
    running: tuple[float, ...]
    best: float | None
    finished: bool


def grid_on(grid: Grid, metric: Mapping[float, float], seeds: int) -> Round:
    """Returns the next round of a grid: all rates on all seeds, then those that it grew by.

    Args:
        grid: The rates.
        metric: By rate, its mean metric on all seeds; rates may be missing.
        seeds: The number of tuning seeds.
    """
    if missing := [rate for rate in grid.rates if rate not in metric]:
        return Round(seeds, tuple(missing), None, False)
    best = grid.best(metric)
    added = grid.extend(best)
    return Round(seeds, tuple(sorted(added)), best, not added)


def _ratio(edge: list[float]) -> float:
    """The ratio that continues a grid, from its last rates, outermost first: 1, 3, 10 continues with 30."""
    if len(edge) == 1:
        return RATIO_OF_ONE
    inner, outer = edge[-1], edge[-2]
    return max(inner / outer, outer / inner)


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")  # 0.3 and not 0.30000000000000004


def tuning_means(table: pd.DataFrame, direction: Direction = MINIMIZE) -> dict[str, dict[float, float]]:
    """The mean final metric by arm and learning rate; diverged trials count as in the verdict."""
    tuning = pd.DataFrame(table[table["phase"] == "tuning"])
    if np.isfinite(tuning[["final_metric", "initial_metric"]].to_numpy()).any():
        metric = judged_metric(tuning, maximize=direction.maximize)
    else:  # no finite value to substitute for a diverged trial
        metric = np.full(len(tuning), direction.cost(np.inf))
    groups: dict[str, dict[float, list[float]]] = {}
    for name, rate, value in zip(tuning["arm"], tuning["learning_rate"], metric, strict=True):
        groups.setdefault(name, {}).setdefault(rate, []).append(value)
    return {name: {rate: _mean(v) for rate, v in rates.items()} for name, rates in groups.items()}


def _mean(metrics: list[float]) -> float:
    return mean_and_error(np.array(metrics))[0] if np.isfinite(metrics).all() else metrics[0]
