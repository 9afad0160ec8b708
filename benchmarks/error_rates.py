"""How often the study's verdict is wrong: on ten thousand tables of metrics whose arms are equal.

An arm is wrongly called better or worse in a share of these tables, which should be at most alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from adaptive_optax.study.direction import Direction
from adaptive_optax.study.statistics.judge import judge_metrics, spending_of
from benchmarks.tables import Table

MEASURES = ("study.statistics.judge",)

TABLES, QUICK_TABLES = 10_000, 100
SEEDS, ALPHA = 8, 0.05
LOOKS = (8, 12, 16)  # seeds by then

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal metrics."""
    return 10 + rng.standard_normal(shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Exponentially distributed metrics; their differences are symmetric."""
    return 1 + rng.exponential(size=shape)


def heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with three degrees of freedom."""
    return 30 + rng.standard_t(3, size=shape)


def tied_and_diverged(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal metrics, rounded to a third of a standard deviation; NaN where one in twenty trials diverged."""
    trials = np.round(10 + 0.3 * rng.standard_normal(shape), 1)
    return np.where(rng.random(shape) < 0.05, np.nan, trials)


def skewed_differences(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Arms that differ from a normal baseline by centred exponential numbers."""
    trials = np.repeat(10 + rng.standard_normal((shape[0], 1, shape[2])), shape[1], axis=1)
    trials[:, 1:] += rng.exponential(size=trials[:, 1:].shape) - 1
    return trials


DRAWS: dict[str, Draw] = {
    "normal": normal,
    "skewed": skewed,
    "heavy tails (Student's t, 3 degrees of freedom)": heavy_tailed,
    "tied, one trial in twenty diverged": tied_and_diverged,
    "normal, with skewed (exponential) differences": skewed_differences,
}


def wrong(metrics: np.ndarray, look: int | None = None) -> np.ndarray:
    """Returns which of the tables [table, arm, seed] call an arm better or worse than the first."""
    diverged = np.isnan(metrics)
    final = np.where(diverged, np.nanmax(metrics, axis=(1, 2), keepdims=True), metrics)
    judged = judge_metrics(final, diverged, 0, Direction(False), None, 0.01, ALPHA, spending_of(look))
    return np.any(np.isin(judged.decision, ("better", "worse")), axis=-1)


def over_looks(trials: np.ndarray) -> np.ndarray:
    """Returns which tables are called wrongly at one of the looks, be they decided before or not."""
    found = np.zeros(len(trials), bool)
    for look, seeds in enumerate(LOOKS, start=1):
        found |= wrong(trials[:, :, :seeds], look)
    return found


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Counts the wrong verdicts."""
    number = QUICK_TABLES if quick else TABLES
    rows = []
    for seed, (name, draw) in enumerate(DRAWS.items()):
        advance(name)
        trials = draw(np.random.default_rng(seed), (number, 2, SEEDS))
        rows.append({"metrics": name, "arms": 1, "wrong": float(wrong(trials).mean())})
    for arms, looks in ((4, 1), (1, len(LOOKS))):
        advance(f"{arms} arms, {looks} looks")
        seeds = LOOKS[-1] if looks > 1 else SEEDS
        trials = normal(np.random.default_rng(len(rows)), (number, arms + 1, seeds))
        found = over_looks(trials) if looks > 1 else wrong(trials)
        rows.append({"metrics": "normal", "arms": arms, "looks": looks, "wrong": float(found.mean())})
    return {"rows": rows, "tables": number, "alpha": ALPHA, "seeds": {"tables": f"0 to {len(rows) - 1}"}}


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the table of wrong verdicts."""
    table = Table(
        f"Equal arms called better or worse, of {result['tables']:,} studies, at α = {result['alpha']:.0%}",
        ["metrics", "arms", "looks, seeds", "wrong, %"],
    )
    for row in result["rows"]:
        looks = ", ".join(map(str, LOOKS)) if row.get("looks", 1) > 1 else str(SEEDS)
        table.add(row["metrics"], str(row["arms"]), looks, f"{100 * row['wrong']:.1f}")
    return {"main": table}
