"""The seeds that `study.Sequential` needs, and what it finds, beside other plans and the best one possible.

Draws normal differences and counts. It takes two CPU-minutes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from adaptive_optax.study.statistics.sequential import Sequential, nominal_levels
from benchmarks.tables import Table

MEASURES = ("study.statistics.sequential",)

ALPHA, TABLES, QUICK_TABLES = 0.05, 1_000_000, 1_000
EFFECTS = (0.0, 0.25, 0.4, 0.5, 0.75, 1.0, 2.0)
FIRST, MOST = 5, 32
PLAN = Sequential(FIRST, MOST)

Plan = tuple[tuple[int, ...], tuple[float, ...]]  # seeds, and level, of every look


def p_values(looks: tuple[int, ...], effect: float, tables: int) -> Iterator[np.ndarray]:
    """The two-sided p-values at each look, of the same tables for every effect and plan with these looks."""
    rng = np.random.default_rng(0)
    total, squares, before = np.zeros(tables), np.zeros(tables), 0
    for n in looks:
        more = n - before
        step = effect * more + math.sqrt(more) * rng.standard_normal(tables)
        inside = rng.chisquare(more - 1, tables) if more > 1 else 0.0
        total, squares, before = total + step, squares + step**2 / more + inside, n
        error = np.sqrt((squares - total**2 / n) / (n - 1) / n)
        yield 2 * special.stdtr(n - 1, -np.abs(total / n / error))


def outcome(plan: Plan, effect: float, tables: int) -> tuple[float, float]:
    """The expected number of seeds, and the share of tables in which a difference is found."""
    undecided, seeds, before = np.ones(tables, bool), 0.0, 0
    for n, level, p in zip(*plan, p_values(plan[0], effect, tables), strict=True):
        seeds, before = seeds + (n - before) * undecided.mean(), n
        undecided &= p >= level
    return seeds, 1 - float(undecided.mean())


def fixed_power(effect: float) -> float:
    """The power of the last look's number of seeds without any look before it."""
    critical, shift = stats.t.isf(ALPHA / 2, MOST - 1), effect * math.sqrt(MOST)
    return float(sum(1 - special.nctdtr(MOST - 1, sign * shift, critical) for sign in (1, -1)))


def plans() -> dict[str, Plan]:
    """Other ways to spend alpha at the same looks, the power family and Lan and DeMets's, and other looks."""

    def spent(function: Callable[[float], float], looks: tuple[int, ...] = PLAN.looks) -> Plan:
        shares = (*(function(n / MOST) for n in looks[:-1]), 1.0)
        return looks, nominal_levels(looks, shares, ALPHA, 2)

    quarter = stats.norm.isf(ALPHA / 4)
    return {
        "`Sequential(5, 32)`": (PLAN.looks, PLAN.levels(ALPHA)),
        "power family, t": spent(lambda t: t),
        "power family, t**2": spent(lambda t: t**2),
        "power family, t**3": spent(lambda t: t**3),
        "like Pocock": spent(lambda t: math.log(1 + (math.e - 1) * t)),
        "like O'Brien and Fleming": spent(lambda t: 4 * float(stats.norm.sf(quarter / math.sqrt(t))) / ALPHA),
        "halving, 2**-k": (PLAN.looks, tuple(ALPHA * 0.5**k for k in range(1, len(PLAN.looks) + 1))),
    }


# ---- The best possible ----
# A rule that stops on the t-statistics of 5, 6, ..., 32 seeds minimises, for some prices a and b,
#
#     E[seeds | d = 2] + a P(no difference found | d = 0.5) + b P(difference found | d = 0),
#
# and the minimum less the prices of what is allowed is below the E[seeds | d = 2] of every rule that keeps to
# what is allowed (weak duality). The likelihood ratio of all t-statistics so far is that of the last one, so
# the minimum follows by dynamic programming over w = S / sqrt(Q) (see the module `sequential`).

ANGLES = np.linspace(-np.pi / 2, np.pi / 2, 603)[1:-1]  # w = sqrt(n) sin(angle)


@functools.cache
def _ratio(n: int, effect: float) -> np.ndarray:
    """The likelihood of w with an effect of either sign, relative to that without one.

    Given w, exp(d sqrt(Q) w - n d**2 / 2) averaged over Q ~ chi-squared with n degrees of freedom.
    """
    nodes, weights = np.polynomial.legendre.leggauss(400)
    low = max(0.0, math.sqrt(n) - 7)
    half = (math.sqrt(n) * (1 + effect) + 9 - low) / 2
    root = low + half * (nodes + 1)
    exponent = effect * math.sqrt(n) * np.sin(ANGLES)[:, None] * root
    density = stats.chi.logpdf(root, n) - n * effect**2 / 2
    return (np.exp(exponent + density) + np.exp(density - exponent)) @ weights * half / 2


@functools.cache
def _next_angles(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The angles after another seed, and their probabilities."""
    nodes, weights = special.roots_jacobi(48, -0.5, n / 2 - 1)
    share = (nodes + 1) / 2
    w = np.sqrt(share) * math.sqrt(n) * np.sin(ANGLES)[:, None]
    ends = np.concatenate([w + np.sqrt(1 - share), w - np.sqrt(1 - share)], axis=1) / math.sqrt(n + 1)
    return np.arcsin(np.clip(ends, -1, 1)), np.tile(weights / weights.sum() / 2, 2)


def fewest_seeds(loss: float) -> float:
    """A lower bound of the expected seeds at d = 2, with a power at d = 0.5 that is less by up to `loss`."""

    def dual(logarithms: np.ndarray) -> float:
        missed, wrong = np.exp(logarithms)
        value = np.minimum(wrong, missed * _ratio(MOST, 0.5))
        for n in range(MOST - 1, FIRST - 1, -1):
            angles, probability = _next_angles(n)
            goes_on = _ratio(n, 2.0) + np.interp(angles, ANGLES, value) @ probability
            value = np.minimum(np.minimum(wrong, missed * _ratio(n, 0.5)), goes_on)
        density = np.cos(ANGLES) ** (FIRST - 2)
        allowed = missed * (1 - fixed_power(0.5) + loss) + wrong * ALPHA
        return FIRST + float(density @ value / density.sum()) - allowed

    found = optimize.minimize(
        lambda x: -dual(x),
        np.log([30.0, 100.0]),
        method="Nelder-Mead",
        options={"xatol": 0.01, "fatol": 1e-3},
    )
    return -float(found.fun)


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Counts seeds and findings of all plans, and bounds the seeds of any."""
    number = QUICK_TABLES if quick else TABLES
    rows = []
    for name, plan in plans().items():
        advance(name)
        found = [outcome(plan, effect, number) for effect in EFFECTS]
        rows.append({"plan": name, "seeds": [seeds for seeds, _ in found], "found": [x for _, x in found]})
    bounds = []
    for points in (2,) if quick else (2, 3, 4, 5, 6, 8):
        advance(f"the fewest seeds, {points} points")
        bounds.append({"points": points, "seeds": fewest_seeds(points / 100)})
    return {
        "rows": rows,
        "without looks": [fixed_power(effect) for effect in EFFECTS],
        "bounds": bounds,
        "effects": EFFECTS,
        "tables": number,
        "seeds": {"tables": 0},
    }


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the tables of expected seeds, of findings and of the bound."""
    columns = ["plan", *(f"d = {effect:g}" for effect in result["effects"])]
    seeds = Table(
        f"Expected seeds of one arm, over {result['tables']:,} tables of normal differences with mean / "
        f"standard deviation d; looks at {', '.join(map(str, PLAN.looks))} seeds",
        columns,
    )
    found = Table(f"In how many of these tables a difference is found, %, at α = {ALPHA:.0%}", columns)
    found.add(f"{MOST} seeds without looks", *(f"{100 * x:.1f}" for x in result["without looks"]))
    for row in result["rows"]:
        seeds.add(row["plan"], *(f"{x:.2f}" for x in row["seeds"]))
        found.add(row["plan"], *(f"{100 * x:.1f}" for x in row["found"]))
    fewest = Table(
        f"The fewest seeds at d = 2 of any rule that looks at {FIRST}, {FIRST + 1}, …, {MOST} seeds",
        ["power at d = 0.5 below that without looks by at most, points", "expected seeds, at least"],
    )
    for bound in result["bounds"]:
        fewest.add(str(bound["points"]), f"{bound['seeds']:.2f}")
    return {"seeds": seeds, "found": found, "fewest": fewest}
