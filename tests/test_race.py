"""The race in tuning: its rounds by hand, how often it takes the grid's rate, and what it spends."""

import csv
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from scipy import stats

from adaptive_optax.study.direction import Direction
from adaptive_optax.study.statistics.race import Round, race, race_on, tuning_costs
from adaptive_optax.study.statistics.tuning import Grid

INF = math.inf
DATA = Path(__file__).parent / "data"


def run(metrics, seeds=None):
    """Races over `metrics`, [rates, seeds], and returns the winner's index and the number of trials."""
    metrics = np.asarray(metrics, float)
    costs = {float(rate): [] for rate in range(len(metrics))}
    while not (found := race(costs, seeds or metrics.shape[1])).finished:
        for rate in found.running:
            costs[rate] = metrics[int(rate), : max(found.seeds, len(costs[rate]))].tolist()
    return int(found.best), sum(map(len, costs.values()))


# ---- Rounds by hand ----


def test_every_rate_runs_on_the_first_seed():
    assert race({0.3: [], 0.1: [], 1.0: [2.0]}, 3) == Round(1, (0.1, 0.3, 1.0), None, False)
    assert race({0.3: [1.0], 0.1: [0.5], 1.0: [2.0]}, 1) == Round(1, (0.1, 0.3, 1.0), 0.1, True)


def test_the_better_half_goes_on_but_at_least_two():
    five = {1.0: [5.0], 2.0: [1.0], 3.0: [2.0], 4.0: [3.0], 5.0: [4.0]}
    assert race(five, 3) == Round(2, (2.0, 3.0, 4.0), 2.0, False)
    assert race({1.0: [5.0], 2.0: [1.0], 3.0: [2.0]}, 3) == Round(2, (2.0, 3.0), 2.0, False)
    assert race({1.0: [5.0], 2.0: [5.0], 3.0: [5.0]}, 2) == Round(2, (1.0, 2.0), 1.0, False)  # a tie
    assert race({1.0: [5.0]}, 3) == Round(1, (1.0,), 1.0, True)


@pytest.mark.parametrize("behind", [0.3, 1.0, 2.0])
def test_a_rate_drops_out_if_it_will_hardly_overtake_the_leader(behind):
    # Differences over two seeds: behind - 0.5, behind + 0.5. The third must be below -2 behind; it has mean
    # behind and standard deviation sqrt(1/2) sqrt(1/2 + 1) with one degree of freedom.
    costs = {1.0: [0.0, 0.0], 2.0: [behind - 0.5, behind + 0.5], 3.0: [9.0]}
    chance = stats.t.cdf(-2 * behind, 1, loc=behind, scale=math.sqrt(0.5 * 1.5))
    runs = (1.0, 2.0) if chance >= 0.1 else (1.0,)
    assert race(costs, 3) == Round(3 if len(runs) > 1 else 2, runs, 1.0, len(runs) == 1)


def test_what_a_seed_does_to_all_rates_does_not_matter():
    rng = np.random.default_rng(0)
    for _ in range(50):
        metrics = rng.standard_normal((6, 1)) + 0.3 * rng.standard_normal((6, 4))
        assert run(metrics) == run(metrics + 10 * rng.standard_normal(4))


def test_diverged_trials_lose():
    costs = {1.0: [3.0, 3.0, 3.0], 2.0: [1.0, INF], 3.0: [4.0, 4.0], 4.0: [INF]}
    # 2.0 leads, diverges, and 1.0 alone is left.
    assert race(costs, 3) == Round(2, (1.0,), 1.0, True)
    # With both that ran diverged, the others come back and catch up; 4.0, which diverged, does not.
    found = race({1.0: [3.0], 2.0: [1.0, INF], 3.0: [2.0, INF], 4.0: [INF]}, 3)
    assert found == Round(2, (1.0,), 2.0, False)
    found = race({1.0: [3.0, 9.0], 2.0: [1.0, INF], 3.0: [2.0, INF], 4.0: [INF]}, 3)
    assert found == Round(2, (1.0,), 1.0, True)
    # If nothing else is left, the fewest diverged trials win, then the lowest rate.
    assert race({1.0: [INF], 2.0: [INF], 3.0: [INF]}, 2) == Round(2, (1.0, 2.0), 1.0, False)
    assert race({1.0: [INF, INF], 2.0: [INF, 7.0], 3.0: [INF]}, 2).best == 2.0


@pytest.mark.parametrize("scale", [1e-300, 1.7e308])
def test_the_unit_does_not_matter(scale):
    metrics = np.random.default_rng(1).uniform(0.1, 1, (6, 3))
    assert run(scale * metrics) == run(metrics)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 5))
def test_a_race_replayed_with_all_trials_is_the_same(seed, rates, seeds):
    rng = np.random.default_rng(seed)
    metrics = np.round(rng.standard_normal((rates, seeds)), 1)
    metrics[rng.random(metrics.shape) < 0.2] = INF
    winner, trials = run(metrics)
    everything = {float(rate): row.tolist() for rate, row in enumerate(metrics)}
    found = race(everything, seeds)
    assert found.finished and int(found.best) == winner
    assert rates <= trials <= rates * seeds


def test_the_grid_grows_after_the_first_seed_and_at_the_end():
    def cost(rate, seed):
        # Best at 0.03; on the first seed alone 0.01 looks as good as 0.03, which is not in the grid yet.
        return abs(math.log10(rate / 0.03)) + 0.01 * seed * (1 + math.log10(rate))

    grid, costs, rounds = Grid([0.0003, 0.001, 0.003], growth=3), {}, []
    while not (found := race_on(grid, costs, 3)).finished:
        rounds.append((found.seeds, found.running))
        for rate in found.running:
            costs[rate] = [cost(rate, seed) for seed in range(max(found.seeds, len(costs.get(rate, []))))]
    assert grid.grown == [0.01, 0.03, 0.1]
    assert [seeds for seeds, _ in rounds] == [1, 1, 1, 1, 2] + [3] * (len(rounds) - 5)
    assert found.best == 0.03
    # A winner that is on the edge at the end only: the grid grows then.
    grid = Grid([0.1, 0.2, 0.4], growth=1)
    late = {0.1: [2.0, 2.0, 2.0], 0.2: [1.0, 1.5, 9.0], 0.4: [1.1, 1.4, 1.0]}
    assert race_on(grid, late, 3) == Round(1, (0.1, 0.2, 0.4, 0.8), None, False)
    assert race_on(grid, {**late, 0.8: [3.0]}, 3) == Round(3, (0.2, 0.4), 0.4, True)  # growth is used up


def test_costs_of_a_table():
    table = pd.DataFrame(
        {
            "arm": ["a", "a", "a", "b", "a"],
            "phase": ["tuning"] * 4 + ["verdict"],
            "learning_rate": [0.1, 0.1, 0.2, 0.1, 0.1],
            "seed": [1, 0, 0, 0, 1000],
            "final_metric": [0.5, 0.25, np.nan, 0.75, 9.0],
            "diverged": [False, False, True, False, False],
        }
    )
    assert tuning_costs(table) == {"a": {0.1: [0.25, 0.5], 0.2: [INF]}, "b": {0.1: [0.75]}}
    assert tuning_costs(table, Direction(True))["a"] == {0.1: [-0.25, -0.5], 0.2: [INF]}


# ---- How often it takes the grid's rate, and what it spends ----


def measured(studies):
    """How often the race takes the grid's rate or one within its standard error; its share of the trials."""
    right, spent = [], []
    for metrics in studies:
        winner, trials = run(metrics)
        means = metrics.mean(axis=1)
        best = means.argmin()
        error = metrics[best].std(ddof=1) / math.sqrt(metrics.shape[1])
        right.append(means[winner] <= means[best] + error)
        spent.append(trials / metrics.size)
    return np.mean(right), np.mean(spent)


def curves(rng, rates, noise, count=1000):
    """Metrics of three seeds: a parabola in log rate, steeper beyond the optimum, that shifts by seed."""
    place = np.arange(rates)
    for _ in range(count):
        away = place - rng.uniform(0.5, rates - 1.5)
        curve = away**2 * np.where(away > 0, rng.uniform(1, 3), 1)
        yield curve[:, None] + rng.standard_normal(3) + noise * rng.standard_normal((rates, 3))


@pytest.mark.parametrize("rates", [6, 7, 8, 9])
@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0, 3.0, 10.0])
def test_synthetic_curves(rates, noise):
    # The noise is that of a trial, in units of the loss one rate beside the optimum.
    right, spent = measured(curves(np.random.default_rng(2), rates, noise))
    assert right >= 0.95
    assert spent <= 0.6


def whole_grid(task):
    """The tuning trials of a study that raced nothing, [rates, seeds], by arm."""
    arms = {}
    with (DATA / f"tuning_{task}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rates = arms.setdefault(row["arm"], {})
            rates.setdefault(float(row["learning_rate"]), []).append(float(row["final_metric"]))
    return {name: np.array([rates[rate] for rate in sorted(rates)]) for name, rates in arms.items()}


@pytest.mark.parametrize("task", ["localization", "text"])
def test_the_built_in_tasks(task):
    # Three seeds are drawn anew from those measured: the mean curve of an arm, the shift of a seed, and the
    # residuals of its trials, scaled to their degrees of freedom.
    rng, studies = np.random.default_rng(3), []
    for metrics in whole_grid(task).values():
        rates, seeds = metrics.shape
        curve, shift = metrics.mean(axis=1), metrics.mean(axis=0) - metrics.mean()
        noise = (metrics - curve[:, None] - shift) * math.sqrt(seeds / (seeds - 1))
        for _ in range(200):
            drawn = rng.integers(seeds, size=(rates, 3)), rng.choice([-1, 1], (rates, 3))
            residual = np.take_along_axis(noise, drawn[0], axis=1) * drawn[1]
            studies.append(curve[:, None] + rng.choice(shift, 3) + residual)
    right, spent = measured(studies)
    assert right >= 0.95
    assert spent <= 0.6
