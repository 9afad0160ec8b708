"""What pictures and tables of a comparison show, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adaptive_optax._drawing import MINUS, plain
from adaptive_optax.study.trials import TELEMETRY

if TYPE_CHECKING:
    from adaptive_optax.study.result import Comparison
    from adaptive_optax.study.verdict import Verdict

MISSING = "\N{EN DASH}"
MARGIN = 0.01  # of the baseline's metric, where the comparison has no absolute one

Number = Callable[[float], str]


# ---- What was found ----


class Tuned(NamedTuple):
    """What tuning found for one arm: arrays with one element a rate, rates ascending.

    The mean of a rate at which a trial diverged is NaN: the mean of the others would flatter it.
    """

    rates: np.ndarray
    mean: np.ndarray
    error: np.ndarray  # standard error; NaN for a single seed
    diverged: np.ndarray
    seeds: np.ndarray
    best: np.ndarray  # True at the rate taken for the verdict
    grown: np.ndarray  # True where the grid grew by this rate


def judge_all(comparison: Comparison) -> tuple[dict[str, Verdict], Verdict | None, str]:
    """Gives the verdicts, the one on the arm that did best in tuning, and the reason where there are none."""
    try:
        verdicts = dict(comparison.verdicts)
        return verdicts, comparison.verdict(), ""
    except ValueError as error:
        return {}, None, str(error)


def tuned_rates(comparison: Comparison, arm: str) -> Tuned:
    """Gives what the trials on the tuning seeds say about an arm's rates."""
    trials = _trials(comparison, "tuning", arm)
    tried, metric, diverged = trials["learning_rate"], trials["final_metric"], trials["diverged"]
    rates = np.unique(tried)
    at = [tried == rate for rate in rates]
    lost = np.array([diverged[rows].sum() for rows in at], int)
    means = [mean_and_error(metric[rows]) for rows in at]
    mean, error = (np.where(lost, np.nan, [m[i] for m in means]) for i in range(2))

    def among(chosen: list[float | None]) -> np.ndarray:
        wanted = np.array([np.nan if rate is None else rate for rate in chosen], float)
        return np.any(np.isclose(rates[:, None], wanted[None], rtol=1e-6, atol=0), axis=1)

    info = comparison.info
    best, grown = among([info["best_rates"].get(arm)]), among(info["grown"].get(arm, []))
    return Tuned(rates, mean, error, lost, np.array([rows.sum() for rows in at], int), best, grown)


def final_metrics(comparison: Comparison) -> dict[str, np.ndarray]:
    """Gives every arm's final metric on the verdict's seeds, ascending; NaN where a trial diverged."""
    trials = _trials(comparison, "verdict")
    seeds, position = np.unique(trials["seed"], return_inverse=True)
    metrics = {}
    for arm in comparison.info["arms"]:
        rows = trials["arm"] == arm
        metrics[arm] = np.full(len(seeds), np.nan)
        metrics[arm][position[rows]] = trials["final_metric"][rows]
    return metrics


def paired_differences(comparison: Comparison, arm: str) -> np.ndarray:
    """Gives arm minus baseline for each of the verdict's seeds; NaN where either diverged."""
    metrics = final_metrics(comparison)
    return metrics[arm] - metrics[comparison.info["baseline"]]


class EffectiveRates(NamedTuple):
    """Learning rates of one arm at its best rate, at the steps at which the optimizer was looked at."""

    scheduled: np.ndarray  # NaN where the transformation does not say
    mean: np.ndarray  # the effective rate, over seeds
    error: np.ndarray  # its standard error, 0 for a single seed


def judged_trials(comparison: Comparison, arm: str) -> np.ndarray:
    """Gives the rows of an arm's trials on the verdict's seeds that did not diverge."""
    table = comparison.table
    rows = (np.asarray(table["phase"], object) == "verdict") & (np.asarray(table["arm"], object) == arm)
    return np.flatnonzero(rows & ~np.asarray(table["diverged"], bool))


def effective_rates(comparison: Comparison, arm: str) -> EffectiveRates | None:
    """Gives what telemetry saw of an arm's learning rate; None where no trial is left."""
    rows = judged_trials(comparison, arm)
    if not len(rows):
        return None
    fields = np.moveaxis(np.asarray(comparison.telemetry_curves)[rows], -1, 0)
    seen = dict(zip(TELEMETRY, fields, strict=True))
    # Between the emissions of an accumulation the parameters stand still, which is no rate of 0.
    stand_still = seen["update_to_weight"] == 0
    effective = np.ma.masked_where(stand_still, seen["effective_learning_rate"])
    error = effective.std(axis=0, ddof=int(len(rows) > 1)) / np.sqrt(len(rows))
    mean = effective.mean(axis=0).filled(np.nan)
    return EffectiveRates(seen["learning_rate"].mean(axis=0), mean, np.ma.filled(error, 0.0))


def own_change(comparison: Comparison, arm: str) -> float:
    """Gives by what factor the effective rate changed beyond the schedule, from first to last quarter.

    The medians of effective over scheduled are compared, as the first steps of Adam are like no others. NaN
    where there is no such factor: without a schedule that is known, or where a median is not positive.
    """
    found = effective_rates(comparison, arm)
    if found is None:
        return np.nan
    share = found.mean / np.where(found.scheduled > 0, found.scheduled, np.nan)
    share = share[np.isfinite(share)]
    quarter = max(1, len(share) // 4)
    if not len(share) or min(early := np.median(share[:quarter]), late := np.median(share[-quarter:])) <= 0:
        return np.nan
    return float(late / early)


def diverged_trials(comparison: Comparison, arm: str) -> tuple[int, int]:
    """Gives how many of an arm's trials on the verdict's seeds diverged, and how many there are."""
    diverged = _trials(comparison, "verdict", arm)["diverged"]
    return int(diverged.sum()), len(diverged)


def equivalence_margin(comparison: Comparison) -> float:
    """Gives the half-width of the region of equivalence in the metric's units; NaN where there is none."""
    margin = comparison.info["margin"]
    baseline = mean_and_error(final_metrics(comparison)[comparison.info["baseline"]])[0]
    if margin is None:
        margin = MARGIN * baseline if baseline > 0 else np.nan
    return float(margin)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Gives the mean and its standard error, leaving out NaN; NaN where there are too few."""
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else np.nan
    return mean, float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def _trials(comparison: Comparison, phase: str, arm: str | None = None) -> dict[str, np.ndarray]:
    table = comparison.table
    kinds = {"arm": object, "learning_rate": float, "seed": int, "final_metric": float, "diverged": bool}
    rows = np.asarray(table["phase"], object) == phase
    if arm is not None:
        rows &= np.asarray(table["arm"], object) == arm
    return {name: np.asarray(table[name], kind)[rows] for name, kind in kinds.items()}


# ---- How it is written ----


def metric_format(comparison: Comparison) -> Number:
    """Gives the way metrics and their differences are written: two digits of the typical standard error."""
    found = np.array([mean_and_error(values) for values in final_metrics(comparison).values()])
    sizes, errors = np.abs(found[np.isfinite(found[:, 0]), 0]), found[found[:, 1] > 0, 1]
    size = np.median(sizes) if len(sizes) else np.nan
    resolution = np.median(errors) if len(errors) else size / 1000
    if 1e-4 <= size < 1e6:
        pattern = f".{int(np.clip(1 - np.floor(np.log10(resolution)), 0, 8))}f"
    else:
        pattern = ".3e"
    return lambda value: written(value, pattern)


def written(value: float, pattern: str, unit: str = "") -> str:
    """Formats a number with a true minus sign, NaN as a dash."""
    return MISSING if np.isnan(value) else f"{value:{pattern}}{unit}".replace("-", MINUS)


def signed(number: Number, value: float) -> str:
    """Writes a difference."""
    return ("+" if value >= 0 else "") + number(value)


def interval(number: Number, ends: tuple[float, float] | None) -> str:
    """Writes an interval of differences."""
    if ends is None or np.isnan(ends).any():
        return MISSING
    return f"{signed(number, ends[0])} to {signed(number, ends[1])}"


def probability(value: float) -> str:
    """Writes a p-value."""
    return "<0.001" if value < 0.001 else written(value, ".3f" if value < 0.1 else ".2f")


def duration(seconds: float) -> str:
    """Writes a time in two units at most."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def decision(verdict: Verdict) -> str:
    """Writes a decision, with its reason where it has one."""
    return f"{verdict.decision} ({verdict.reason})" if verdict.reason else verdict.decision


def best_rate(comparison: Comparison, arm: str) -> str:
    """Writes the rate taken for the verdict, with a star on the edge of the grid."""
    rate = comparison.info["best_rates"].get(arm)
    if rate is None or np.isnan(rate):
        return MISSING
    return plain(rate) + ("*" if comparison.info["on_edge"].get(arm) else "")
