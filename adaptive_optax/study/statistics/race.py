"""The race in tuning: every rate runs on the first seed, then only rates that can still win.

After each seed the better half of the rates goes on, but at least two (successive halving: Karnin, Koren and
Somekh 2013, ICML, Proc. Mach. Learn. Res. 28:1238). From the second seed on, the spread is known, and a rate
also drops out if it will hardly overtake the leader. Let D be its mean cost above the leader's on the first s
of T seeds, and sd the standard deviation of such differences between seeds. The mean over all T seeds is
ahead of the leader's if the mean over the other T - s is below -D s / (T - s). With no other knowledge of the
true difference that mean is D + sd sqrt(1/s + 1/(T - s)) t, so

    P(overtakes) = P(t > D / sd sqrt(s T / (T - s))).

Rates are compared on the same seeds, so what a seed does to all rates does not matter. Nothing here remembers
an earlier decision: a race is replayed from its trials, whether they were run now, before a crash, or for a
grid that has grown since.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import special

from adaptive_optax.study.direction import MINIMIZE, Direction
from adaptive_optax.study.statistics.tuning import Grid, Round

CHANCE = 0.1  # of overtaking, below which a rate drops out


def race(costs: Mapping[float, Sequence[float]], seeds: int) -> Round:
    """Returns the first round of a race that lacks trials, or its end.

    A rate with a diverged trial loses against every rate without one. If all running rates have diverged,
    those that have not come back, even if they had dropped out.

    Args:
        costs: By rate, the final metric of its trials in the order of the tuning seeds, lower is better, inf
            where a trial diverged. Trials that the race does not need are ignored.
        seeds: The number of tuning seeds, T.

    Examples:
        >>> race({0.01: [2.0], 0.03: [1.0], 0.1: [1.1], 0.3: [5.0]}, seeds=3)
        Round(seeds=2, running=(0.03, 0.1), best=0.03, finished=False)
    """
    running, best = sorted(costs), None
    for seed in range(1, seeds + 1):
        dropped = [rate for rate in sorted(costs) if rate not in running and not _lost(costs[rate][:seed])]
        if dropped and all(_lost(costs[rate][:seed]) for rate in running):
            running = dropped
        if any(len(costs[rate]) < seed for rate in running):
            return Round(seed, tuple(running), best, False)
        running = _ranked({rate: costs[rate][:seed] for rate in running})
        best = running[0]
        if seed < seeds:
            running = sorted(_can_win(running, costs, seed, seeds))
        if len(running) == 1 or seed == seeds:
            return Round(seed, tuple(sorted(running)), best, True)
    raise AssertionError("The last seed ends the race.")


def race_on(grid: Grid, costs: Mapping[float, Sequence[float]], seeds: int) -> Round:
    """Like `race`, on a grid that grows while its best rate is on the edge: after one seed, and at the end.

    A rate that was added runs on the first seed, and the race goes on as if the grid had been given so.

    Args:
        grid: The rates.
        costs: By rate as for `race`; rates may be missing.
        seeds: The number of tuning seeds.
    """

    def so_far() -> Round:
        return race({rate: costs.get(rate, ()) for rate in grid.rates}, seeds)

    found = so_far()
    if found.best is not None and (found.seeds == 2 or found.finished) and grid.extend(found.best):
        found = so_far()
    return found


def tuning_costs(table: pd.DataFrame, direction: Direction = MINIMIZE) -> dict[str, dict[float, list[float]]]:
    """The costs of a table's tuning trials by arm and learning rate, in the order of the seeds."""
    tuning = pd.DataFrame(table[table["phase"] == "tuning"]).sort_values("seed")
    costs = direction.cost(np.asarray(tuning["final_metric"], float))
    costs = np.where(np.isfinite(costs) & ~np.asarray(tuning["diverged"], bool), costs, np.inf)
    found: dict[str, dict[float, list[float]]] = {}
    for name, rate, cost in zip(tuning["arm"], tuning["learning_rate"], costs.tolist(), strict=True):
        found.setdefault(name, {}).setdefault(rate, []).append(cost)
    return found


def _lost(costs: Sequence[float]) -> bool:
    """Whether a trial diverged."""
    return math.inf in costs


def _ranked(costs: Mapping[float, Sequence[float]]) -> list[float]:
    """The rates from best to worst: with the fewest diverged trials, then the best mean, then the lowest."""

    def key(rate: float) -> tuple[int, float, float]:
        finite = [cost for cost in costs[rate] if math.isfinite(cost)]
        share = 1 / max(len(finite), 1)  # before adding up, which may overflow
        return len(costs[rate]) - len(finite), math.fsum(share * cost for cost in finite), rate

    return sorted(costs, key=key)


def _can_win(
    ranked: list[float], costs: Mapping[float, Sequence[float]], seed: int, seeds: int
) -> list[float]:
    """The rates, of those ranked after `seed` of `seeds` seeds, that go on."""
    kept = ranked[: max(2, math.ceil(len(ranked) / 2))]
    finite = [rate for rate in kept if not _lost(costs[rate][:seed])]
    if not finite:
        return kept
    if seed == 1 or len(finite) == 1:
        return finite
    ranked = [rate for rate in ranked if not _lost(costs[rate][:seed])]
    trials = np.array([costs[rate][:seed] for rate in ranked])
    trials = trials / max(np.abs(trials).max(), np.finfo(float).tiny)  # so that squares do not overflow
    means = trials.mean(axis=1)
    noise = trials - means[:, None] - trials.mean(axis=0) + trials.mean()
    df = (len(ranked) - 1) * (seed - 1)
    spread = math.sqrt(2 * (noise**2).sum() / df)
    behind = (means - means[0]) * math.sqrt(seed * seeds / (seeds - seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(behind > 0, behind / spread, 0.0)
    chance = dict(zip(ranked, special.stdtr(df, -t), strict=True))
    return [rate for rate in finite if chance[rate] >= CHANCE]
