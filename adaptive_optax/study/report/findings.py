"""The numbers that pictures and tables of a comparison show, and their formatting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from adaptive_optax._core.drawing import MINUS, plain
from adaptive_optax.study.engine.trials import TELEMETRY
from adaptive_optax.study.judged import TRAINED, Judged
from adaptive_optax.study.record import Record
from adaptive_optax.study.statistics.paired import column_means, mean_and_error
from adaptive_optax.study.statistics.verdict import Verdict

MISSING = "\N{EN DASH}"
MARGIN = 0.01  # of the baseline's metric, if the comparison has no absolute margin

Number = Callable[[float], str]


# ---- What was found ----


class Tuned(NamedTuple):
    """What tuning found for one arm: arrays with one element per rate, rates ascending.

    If a trial diverged at a rate, its mean is NaN: the mean of the others would be too favourable.
    """

    rates: np.ndarray
    mean: np.ndarray
    error: np.ndarray  # standard error; NaN for a single seed
    diverged: np.ndarray
    seeds: np.ndarray
    best: np.ndarray  # True at the rate used for the verdict
    grown: np.ndarray  # True for rates that were added to the grid


def judge_all(record: Record) -> tuple[dict[str, Verdict], Verdict | None, str]:
    """Returns the verdicts, the verdict on the arm that did best in tuning, and why if there are none."""
    try:
        verdicts = dict(record.verdicts)
        return verdicts, record.verdict(), ""
    except ValueError as error:
        return {}, None, str(error)


def judged_by(record: Record, arm: str) -> Judged:
    """Returns what an arm was judged by."""
    return record.details.judged.get(arm, TRAINED)


def tuned_rates(record: Record, arm: str) -> Tuned:
    """Returns the results of an arm's trials on the tuning seeds, by rate."""
    trials = _trials(record, "tuning", arm)
    tried, metric, diverged = trials["learning_rate"], trials["final_metric"], trials["diverged"]
    rates = np.unique(tried)
    at = [tried == rate for rate in rates]
    lost = np.array([diverged[rows].sum() for rows in at], int)
    means = [mean_and_error(metric[rows]) for rows in at]
    mean, error = (np.where(lost, np.nan, [m[i] for m in means]) for i in range(2))

    def among(chosen: Sequence[float | None]) -> np.ndarray:
        wanted = np.array([np.nan if rate is None else rate for rate in chosen], float)
        return np.any(np.isclose(rates[:, None], wanted[None], rtol=1e-6, atol=0), axis=1)

    details = record.details
    best, grown = among([details.best_rates.get(arm)]), among(details.grown.get(arm, []))
    return Tuned(rates, mean, error, lost, np.array([rows.sum() for rows in at], int), best, grown)


def final_metrics(record: Record) -> dict[str, np.ndarray]:
    """Returns every arm's final metrics, ordered by the verdict's seeds; NaN for diverged or no trials."""
    trials = _trials(record, "verdict")
    seeds, position = np.unique(trials["seed"], return_inverse=True)
    metrics = {}
    for arm in record.details.arms:
        rows = trials["arm"] == arm
        metrics[arm] = np.full(len(seeds), np.nan)
        metrics[arm][position[rows]] = trials["final_metric"][rows]
    return metrics


def paired_metrics(record: Record, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the final metrics of arm and baseline on the verdict's seeds that both have run on.

    NaN for diverged trials.
    """
    mine, base = (_trials(record, "verdict", name) for name in (arm, record.details.baseline))
    _, *rows = np.intersect1d(mine["seed"], base["seed"], return_indices=True)
    return mine["final_metric"][rows[0]], base["final_metric"][rows[1]]


def paired_differences(record: Record, arm: str) -> np.ndarray:
    """Returns arm minus baseline for each seed that both have run on; NaN where either diverged."""
    metrics, base = paired_metrics(record, arm)
    return metrics - base


class EffectiveRates(NamedTuple):
    """Learning rates of one arm at its best peak rate, at the steps that telemetry measured."""

    scheduled: np.ndarray  # NaN where unknown
    mean: np.ndarray  # the effective rate, over seeds
    error: np.ndarray  # its standard error, 0 for a single seed


def judged_trials(record: Record, arm: str) -> np.ndarray:
    """Returns the rows of an arm's trials on the verdict's seeds that did not diverge."""
    table = record.table
    rows = (np.asarray(table["phase"], object) == "verdict") & (np.asarray(table["arm"], object) == arm)
    return np.flatnonzero(rows & ~np.asarray(table["diverged"], bool))


def _measured(record: Record, arm: str) -> dict[str, np.ndarray] | None:
    """Returns what telemetry measured of an arm, [trial, measurement]; None if every trial diverged."""
    rows = judged_trials(record, arm)
    if not len(rows):
        return None
    fields = np.moveaxis(np.asarray(record.telemetry_curves)[rows], -1, 0)
    return dict(zip(TELEMETRY, fields, strict=True))


def effective_rates(record: Record, arm: str) -> EffectiveRates | None:
    """Returns an arm's learning rates as measured by telemetry; None if every trial diverged."""
    seen = _measured(record, arm)
    if seen is None:
        return None
    # While gradients are accumulated the parameters do not change; that is not a rate of 0.
    unchanged = seen["update_to_weight"] == 0
    effective = np.where(unchanged, np.nan, seen["effective_learning_rate"])
    mean, error = column_means(effective, leave_out=True)
    return EffectiveRates(column_means(seen["learning_rate"])[0], mean, error)


class Limits(NamedTuple):
    """What `error_controlled` measured of one arm at its best peak rate."""

    limit: np.ndarray  # the geometric mean over seeds, NaN where it is 0
    edge: np.ndarray  # likewise 2 / curvature, NaN where the curvature is not positive
    error: float  # the median over seeds and measurements
    limited: float  # the share of the measured steps in which the limit was the learning rate


def limits(record: Record, arm: str) -> Limits | None:
    """Returns an arm's limits as measured by telemetry; None if there are none."""
    seen = _measured(record, arm)
    if seen is None or not np.isfinite(seen["step_limit"]).any():
        return None
    limit, curvature, errors = seen["step_limit"], seen["curvature"], seen["error"]
    errors = errors[np.isfinite(errors)]
    return Limits(
        limit=_geometric_mean(limit),
        edge=2 / _geometric_mean(curvature),
        error=float(np.median(errors)) if len(errors) else np.nan,
        limited=float(np.isclose(seen["learning_rate"], limit, rtol=1e-5, atol=0)[np.isfinite(limit)].mean()),
    )


def _geometric_mean(curves: np.ndarray) -> np.ndarray:
    """Returns the geometric mean of the positive values of every column."""
    return np.exp(column_means(np.log(np.where(curves > 0, curves, np.nan)), leave_out=True)[0])


def own_change(record: Record, arm: str) -> float:
    """Returns the factor by which the effective rate changed beyond the schedule, first to last quarter.

    Compares medians of effective over scheduled rates, because Adam's first steps are exceptional. NaN if
    the schedule is unknown or a median is not positive.
    """
    found = effective_rates(record, arm)
    if found is None:
        return np.nan
    share = found.mean / np.where(found.scheduled > 0, found.scheduled, np.nan)
    share = share[np.isfinite(share)]
    quarter = max(1, len(share) // 4)
    if not len(share) or min(early := np.median(share[:quarter]), late := np.median(share[-quarter:])) <= 0:
        return np.nan
    return float(late / early)


def own_rates(record: Record) -> dict[str, str]:
    """Returns the rates that arms declare and were tuned over, instead of those given to all."""
    details = record.details
    return {
        arm: ", ".join(plain(rate) for rate in details.grid[arm] if rate not in details.grown.get(arm, ()))
        for arm in details.own_rates
        if arm in details.grid
    }


def diverged_trials(record: Record, arm: str) -> tuple[int, int]:
    """Returns how many of an arm's trials on the verdict's seeds diverged, and the number of trials."""
    diverged = _trials(record, "verdict", arm)["diverged"]
    return int(diverged.sum()), len(diverged)


def fresh_seeds(record: Record) -> str:
    """Formats the number of fresh seeds, which a plan may let differ between arms: "8" or "5 to 13"."""
    if record.details.sequential is None:
        return str(record.details.seeds)
    counts = sorted({diverged_trials(record, arm)[1] for arm in record.details.arms})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])


def seeds_used(record: Record) -> str:
    """Says how many fresh seeds there were, and with a plan, of how many."""
    details, plan = record.details, record.details.sequential
    if plan is None:
        return f"{details.seeds} fresh seeds"
    used = max(details.looks, default=0)
    text = f"{used} of at most {plan.most} fresh seeds"
    if not used or record.unfinished:
        return f"{text} so far"
    return text if used == plan.most else f"stopped after {text}"


def tuning_seeds(record: Record) -> str:
    """Formats the number of tuning seeds."""
    count = record.details.tuning_seeds
    most = "up to " * (record.details.tuning == "race" and count > 1)
    return f"{most}{count} tuning seed{'s' * (count > 1)}"


def dropped_out(record: Record) -> str:
    """Says how many rates dropped out of a race, and after how many seeds; "" if none did."""
    counts: dict[int, int] = {}
    tuned = [tuned_rates(record, arm) for arm in record.details.arms]
    for found in tuned:
        for seeds in found.seeds[~found.best & (found.seeds < record.details.tuning_seeds)]:
            counts[int(seeds)] = counts.get(int(seeds), 0) + 1
    after = [f"{counts[seeds]} after {seeds} seed{'s' * (seeds > 1)}" for seeds in sorted(counts)]
    rates = sum(len(found.rates) for found in tuned)
    if not after:
        return ""
    dropped = f"{sum(counts.values())} of {rates} rates dropped out of the race"
    return f" {dropped}, {', '.join(after)}; their means are over these seeds."


def equivalence_margin(record: Record) -> float:
    """Returns the half-width of the region of equivalence in the metric's units; NaN if there is none."""
    margin = record.details.margin
    baseline = mean_and_error(final_metrics(record)[record.details.baseline])[0]
    if margin is None:
        margin = MARGIN * baseline if baseline > 0 else np.nan
    return float(margin)


def _trials(record: Record, phase: str, arm: str | None = None) -> dict[str, np.ndarray]:
    table = record.table
    kinds = {"arm": object, "learning_rate": float, "seed": int, "final_metric": float, "diverged": bool}
    rows = np.asarray(table["phase"], object) == phase
    if arm is not None:
        rows &= np.asarray(table["arm"], object) == arm
    return {name: np.asarray(table[name], kind)[rows] for name, kind in kinds.items()}


# ---- Formatting ----


def metric_format(record: Record) -> Number:
    """Returns a formatter for metrics and their differences: two digits of the typical standard error."""
    found = np.array([mean_and_error(values) for values in final_metrics(record).values()])
    sizes, errors = np.abs(found[np.isfinite(found[:, 0]), 0]), found[found[:, 1] > 0, 1]
    size = np.median(sizes) if len(sizes) else np.nan
    resolution = np.median(errors) if len(errors) else size / 1000
    if 1e-4 <= size < 1e6:
        pattern = f".{int(np.clip(1 - np.floor(np.log10(resolution)), 0, 8))}f"
    else:
        pattern = ".3e"
    return lambda value: written(value, pattern)


def written(value: float, pattern: str, unit: str = "") -> str:
    """Formats a number with a typographic minus sign, NaN as a dash."""
    return MISSING if np.isnan(value) else f"{value:{pattern}}{unit}".replace("-", MINUS)


def signed(number: Number, value: float) -> str:
    """Formats a difference."""
    return MISSING if np.isnan(value) else ("+" if value >= 0 else "") + number(value)


def interval(number: Number, ends: tuple[float, float] | None) -> str:
    """Formats an interval of differences."""
    if ends is None or np.isnan(ends).any():
        return MISSING
    return f"{signed(number, ends[0])} to {signed(number, ends[1])}"


def probability(value: float) -> str:
    """Formats a p-value."""
    return "<0.001" if value < 0.001 else written(value, ".3f" if value < 0.1 else ".2f")


def decision(verdict: Verdict) -> str:
    """Formats a decision, with its reason if it has one."""
    return f"{verdict.decision} ({verdict.reason})" if verdict.reason else verdict.decision


def best_rate(record: Record, arm: str) -> str:
    """Formats the rate used for the verdict, with a star if it is on the edge of the grid."""
    rate = record.details.best_rates.get(arm)
    if rate is None or np.isnan(rate):
        return MISSING
    return plain(rate) + ("*" if record.details.on_edge.get(arm) else "")
