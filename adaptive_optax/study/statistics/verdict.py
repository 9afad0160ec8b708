"""The verdict: paired statistics over seeds that say better, worse, equivalent or undecided.

Seeds are paired: the same seed means the same initial parameters and the same batches in every arm, so only
the differences of an arm from the baseline are judged. A difference is sought with the paired t-test,
equivalence with two one-sided ones (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657). Both are corrected
for several arms (Holm 1979, Scand. J. Statist. 6:65) and for judging again after seeds were added. That no
difference was found never counts as "equivalent": it is "undecided".
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats

from adaptive_optax._checks import check_choice, check_integer, check_scalar

# special.stdtr, stdtrit and nctdtr are what stats.t and stats.nct evaluate, at 2 instead of 40 us a call.

_ROUNDING = 4 * np.finfo(np.float64).eps  # relative to the metric; a smaller spread is no variance
_POWER = 0.8
_MOST_SEEDS = 10_000


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the seeds say about one arm. Lower metrics are better; differences are arm minus baseline.

    Attributes:
        arm: The arm that is judged.
        baseline: The arm that it is compared with.
        decision: "better", "worse", "equivalent" or "undecided".
        effect: The mean difference of the final metric, paired by seed.
        relative_effect: `effect` / the baseline's mean metric; NaN where that is not positive.
        interval: The interval to quote: paired t, at the level that `p_value` is adjusted to, so that it
            excludes 0 exactly where `p_value` < alpha. NaNs for a deterministic task.
        interval_95: The plain 95 % paired-t interval, for this arm alone. NaNs likewise.
        bootstrap: The 95 % bootstrap interval, for this arm alone; None where none was asked for.
        p_value: Of the two-sided paired t-test, Holm-adjusted over arms, times 2**look, at most 1. NaN for a
            deterministic task.
        p_equivalence: The larger p-value of the two one-sided tests, adjusted likewise. NaN likewise.
        margin: The absolute margin of equivalence; None where it is relative to the baseline.
        seeds: The number of pairs.
        seeds_needed: Where undecided: how many seeds in all would decide, either way, with power 0.8 if the
            effect is as seen. None where decided, for a deterministic task, and above 10 000.
        best_effect: The mean difference of the best metric so far, which favours not decaying. NaN where the
            table lacks best_metric.
        diverged: The numbers of diverged trials of arm and baseline.
        reason: "" or "deterministic task".
        sentence: The verdict in one plain sentence.
    """

    arm: str
    baseline: str
    decision: str
    effect: float
    relative_effect: float
    interval: tuple[float, float]
    interval_95: tuple[float, float]
    bootstrap: tuple[float, float] | None
    p_value: float
    p_equivalence: float
    margin: float | None
    seeds: int
    seeds_needed: int | None
    best_effect: float
    diverged: tuple[int, int]
    reason: str
    sentence: str


def judge(
    table: pd.DataFrame,
    *,
    baseline: str,
    margin: float | None = None,
    relative_margin: float = 0.01,
    alpha: float = 0.05,
    look: int | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Verdict]:
    """Judges every arm of a table of trials against the baseline; needs no training.

    With a and b the final metrics of arm and baseline, paired by seed, and r = `relative_margin`:

        difference     mean(a - b) = 0, two-sided paired t-test
        equivalence    mean(a - (1 + r) b) < 0 and mean(a - (1 - r) b) > 0, a one-sided paired t-test each;
                       with an absolute margin mean(a - b) < margin and mean(a - b) > -margin
        several arms   Holm's step-down, separately over the differences and over the equivalences
        look k         spends alpha 2**-k: p-values are multiplied by 2**k; all looks together spend < alpha

    The decision is "equivalent" if p_equivalence < alpha (a difference may then exist, but one too small to
    matter); else "better" or "worse" if p_value < alpha; else "undecided". Differences that are all exactly 0
    make an arm equivalent; all alike otherwise, up to rounding, they leave nothing to test with: undecided,
    "deterministic task".

    A diverged trial counts with the larger of its own initial metric and the worst finite final metric of the
    judged trials. Diverged are the trials marked so and those whose final metric is NaN or, where the table
    has no column diverged, infinite.

    Args:
        table: One row a trial: arm, seed, final_metric; optionally initial_metric, best_metric, diverged and
            phase (only rows of phase "verdict" are then judged). All arms have the same seeds, at least 2.
        baseline: The arm that the others are compared with.
        margin: Smaller differences than this do not matter; in the metric's units, (0, inf). None: relative.
        relative_margin: The same as a fraction of the baseline's metric, in (0, 1).
        alpha: Error rate over all arms and looks, in (0, 1).
        look: 1 when judging first, 2 after adding seeds, and so on to 100. None: there is only one look.
        resamples: Bootstrap resamples; 0 for no bootstrap interval.
        seed: Seed of the bootstrap, the same for every arm.

    Returns:
        A verdict for each arm but the baseline, in the table's order.

    Raises:
        ValueError: If an argument is out of range; if the table is not one trial for each arm and seed; if no
            metric is finite and none can stand in; if the margin is relative and a baseline metric is not
            positive.
    """
    check_scalar("relative_margin", relative_margin, "(0, 1)")
    check_scalar("alpha", alpha, "(0, 1)")
    check_integer("resamples", resamples, "[0, inf)")
    check_integer("seed", seed, "[0, inf)")
    if margin is not None:
        check_scalar("margin", margin, "(0, inf)")
        margin = float(margin)
    if look is not None:
        check_integer("look", look, "[1, 100]")
    arms, final, best, diverged = _grid(table)
    check_choice("baseline", baseline, arms)
    base, others = arms.index(baseline), [row for row, arm in enumerate(arms) if arm != baseline]
    a, b = final[others], final[base]
    if margin is None and (b <= 0).any():
        raise ValueError(
            "margin must be given, in the metric's units: a relative one needs positive metrics of the "
            f"baseline, got {b.min():g}."
        )

    above = b * (1 + relative_margin) if margin is None else b + margin
    below = b * (1 - relative_margin) if margin is None else b - margin
    mean, error, t, constant = _paired_t(a, np.stack([b, above, below])[:, None])  # [3 tests, arms]
    same = (a == b).all(axis=1)
    deterministic = constant[0] & ~same
    seeds, df = b.size, b.size - 1
    p_difference = np.where(deterministic, 1.0, 2 * special.stdtr(df, -np.abs(t[0])))
    p_equivalence = np.maximum(special.stdtr(df, t[1]), special.stdtr(df, -t[2]))
    p_equivalence = np.where(same, 0.0, np.where(deterministic, 1.0, p_equivalence))

    spent = 1.0 if look is None else 2.0**look
    adjusted, factor = _holm(p_difference)
    adjusted_equivalence, factor_equivalence = _holm(p_equivalence)
    p_values = np.where(deterministic, np.nan, np.minimum(spent * adjusted, 1))
    p_equivalences = np.where(deterministic, np.nan, np.minimum(spent * adjusted_equivalence, 1))

    # p_value < alpha is p_difference < level, so the interval at 1 - level excludes 0 exactly then. Neither
    # value is clipped at 1 here; where p_difference underflowed to 0, Holm's factor is the ratio's limit.
    level = alpha / spent * np.divide(p_difference, adjusted, out=1 / factor, where=adjusted > 0)
    effect, error = mean[0], np.where(deterministic, np.nan, error[0])
    half, half_95 = (-special.stdtrit(df, two_sided / 2) * error for two_sided in (level, 0.05))

    next_alpha = alpha if look is None else alpha / (2 * spent)
    adjustments = [f"{len(others)} arms"] * (len(others) > 1) + ["repeated looks"] * (look is not None)
    verdicts = {}
    for i, row in enumerate(others):
        needed = None
        if p_equivalences[i] < alpha:
            decision = "equivalent"
        elif p_values[i] < alpha:
            decision = "better" if effect[i] < 0 else "worse"
        else:
            decision = "undecided"
            if not deterministic[i]:
                levels = next_alpha / factor[i], next_alpha / factor_equivalence[i]
                needed = _seeds_needed(seeds, t[:, i] / math.sqrt(seeds), *levels)
        verdict = Verdict(
            arm=arms[row],
            baseline=baseline,
            decision=decision,
            effect=float(effect[i]),
            relative_effect=float(effect[i] / b.mean()) if b.mean() > 0 else math.nan,
            interval=(float(effect[i] - half[i]), float(effect[i] + half[i])),
            interval_95=(float(effect[i] - half_95[i]), float(effect[i] + half_95[i])),
            bootstrap=_bootstrap(a[i] - b, resamples, seed) if resamples else None,
            p_value=float(p_values[i]),
            p_equivalence=float(p_equivalences[i]),
            margin=margin,
            seeds=seeds,
            seeds_needed=needed,
            best_effect=math.nan if best is None else float((best[row] - best[base]).mean()),
            diverged=(int(diverged[row].sum()), int(diverged[base].sum())),
            reason="deterministic task" if deterministic[i] else "",
            sentence="",
        )
        sentence = _sentence(verdict, relative_margin, alpha, adjustments)
        verdicts[verdict.arm] = dataclasses.replace(verdict, sentence=sentence)
    return verdicts


# ---- The table ----


def judged_metric(table: pd.DataFrame) -> pd.Series:
    """Gives the final metric of every row as `judge` counts it, with something finite for diverged trials.

    Raises:
        ValueError: If no metric is finite and none can stand in, or if the columns are not as `judge` says.
    """
    return pd.Series(_outcomes(table)[0], index=table.index, name="final_metric")


def _outcomes(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gives, by row, the judged final metric, what stands in for a diverged trial's, and which diverged."""
    final = _numbers(table, "final_metric")
    finite = np.isfinite(final)
    diverged = ~finite
    if "diverged" in table.columns:
        marks = table["diverged"].to_numpy()
        if marks.dtype != bool and not np.isin(marks, (False, True)).all():
            raise ValueError(
                f"diverged must be True or False in every row, got {table['diverged'].dtype} values."
            )
        marks = marks.astype(bool)
        if (np.isinf(final) & ~marks).any():
            raise ValueError(
                "final_metric must be finite or NaN where diverged is False, got an infinite one."
            )
        diverged |= marks
    stand_in = np.full(final.shape, final[finite].max() if finite.any() else np.nan)
    if "initial_metric" in table.columns:
        initial = _numbers(table, "initial_metric")
        stand_in = np.fmax(stand_in, np.where(np.isfinite(initial), initial, np.nan))  # fmax ignores NaNs
    if np.isnan(stand_in[diverged]).any():
        raise ValueError(
            "final_metric must be finite in some trial, or initial_metric where a trial diverged."
        )
    return np.where(diverged, stand_in, final), stand_in, diverged


def _numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    try:
        return table[column].to_numpy(float, na_value=np.nan)
    except (TypeError, ValueError):
        raise ValueError(f"{column} must hold numbers, got {table[column].dtype} values.") from None


def _grid(table: pd.DataFrame) -> tuple[list[str], np.ndarray, np.ndarray | None, np.ndarray]:
    """Gives the arms and, as [arms, seeds], judged final metrics, best metrics, and which trials diverged."""
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"table must be a pandas DataFrame, got {type(table).__name__}.")
    if missing := [name for name in ("arm", "seed", "final_metric") if name not in table.columns]:
        raise ValueError(f"table must have columns arm, seed and final_metric, got none named {missing[0]}.")
    if "phase" in table.columns:
        table = table.loc[table["phase"] == "verdict"]
    if table.empty:
        raise ValueError("table must have trials to judge (of phase 'verdict', if it has phases), got none.")
    arm_of, arms = pd.factorize(table["arm"])
    seed_of, seeds = pd.factorize(table["seed"].to_numpy(), sort=True)
    if min(arm_of.min(), seed_of.min()) < 0:
        raise ValueError("table must name the arm and the seed in every row, got a row where one is missing.")
    shape = len(arms), len(seeds)
    if shape[0] < 2:
        raise ValueError(f"table must have the baseline and another arm, got {arms[0]!r} alone.")
    if shape[1] < 2:
        raise ValueError(f"table must have at least 2 seeds, got {seeds[0]} alone.")
    trials = np.bincount(arm_of * shape[1] + seed_of, minlength=shape[0] * shape[1]).reshape(shape)
    if (trials != 1).any():
        arm, seed = np.argwhere(trials != 1)[0]
        raise ValueError(
            f"table must have one row for each arm and seed, got {trials[arm, seed]} for arm {arms[arm]!r} "
            f"and seed {seeds[seed]}."
        )
    at = np.argsort(arm_of * shape[1] + seed_of)  # the row of each arm and seed
    final, stand_in, diverged = (values[at].reshape(shape) for values in _outcomes(table))
    best = None
    if "best_metric" in table.columns:
        best = _numbers(table, "best_metric")[at].reshape(shape)
        best = np.where(np.isfinite(best), best, stand_in)
    return list(arms), final, best, diverged


# ---- Statistics ----


class _PairedT(NamedTuple):
    mean: np.ndarray
    error: np.ndarray  # the mean's standard error; 0 where constant
    t: np.ndarray  # mean / error; its limit where constant, 0 or infinite
    constant: np.ndarray  # whether all differences are alike, up to rounding


def _paired_t(a: np.ndarray, b: np.ndarray) -> _PairedT:
    """Student's t of the differences a - b along the last axis."""
    # Measured in powers of two no smaller than the metrics: exact, and no square under- or overflows.
    unit = np.ldexp(1.0, np.frexp(np.maximum(np.abs(a), np.abs(b)).max(axis=-1))[1])
    x = (a - b) / unit[..., None]
    mean, constant = x.mean(axis=-1), np.ptp(x, axis=-1) <= _ROUNDING
    error = np.where(constant, 0.0, x.std(axis=-1, ddof=1) / math.sqrt(x.shape[-1]))
    limit = np.where(np.abs(mean) <= _ROUNDING, 0.0, np.copysign(np.inf, mean))
    t = np.where(constant, limit, mean / np.where(constant, 1.0, error))
    return _PairedT(mean * unit, error * unit, t, constant)


def _holm(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives Holm's adjusted p-values, not clipped at 1, and the factor of each (scipy has no Holm).

    factor_i = number of p_j >= p_i;  adjusted_i = maximum of factor_j p_j over p_j <= p_i.
    """
    below = p[:, None] <= p[None, :]
    factor = below.sum(axis=1)
    return np.where(below, (factor * p)[:, None], 0.0).max(axis=0), factor


def _bootstrap(differences: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % BCa interval of the mean (Efron 1987); the percentile interval where BCa is undefined.

    BCa is undefined if the differences are all alike, or if all resampled means lie on one side of the mean.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # about what the check below finds
        for method in ("BCa", "percentile"):
            low, high = stats.bootstrap(
                (differences,), np.mean, n_resamples=resamples, method=method, rng=np.random.default_rng(seed)
            ).confidence_interval
            if np.isfinite([low, high]).all():
                break
    return float(low), float(high)


def _seeds_needed(seeds: int, effects: np.ndarray, level: float, level_equivalence: float) -> int | None:
    """Gives the smallest number of seeds, more than `seeds`, at which a test has power 0.8, or None.

    `effects` are mean / standard deviation of a - b, a - above and a - below. The power of the two-sided test
    leaves out the chance of deciding for the wrong side. That of the two one-sided tests together is at least
    the sum of their powers minus 1; it is more only by the chance that both fail at once, which is negligible
    at the powers sought.
    """
    difference, above, below = effects

    def power(n: int, effect: float, one_sided: float) -> float:
        """P(T > critical) for noncentral t with n - 1 degrees of freedom and noncentrality effect sqrt(n)."""
        noncentrality = effect * math.sqrt(n)
        if noncentrality <= 0:
            return 0.0
        critical = -special.stdtrit(n - 1, one_sided)
        missed = special.nctdtr(n - 1, noncentrality, critical) if noncentrality < 1e5 else math.nan
        if math.isnan(missed):  # so large a noncentrality leaves the variance's chi-squared alone to chance
            return special.chdtr(n - 1, (n - 1) * (noncentrality / critical) ** 2)
        return 1 - missed

    def power_of_difference(n: int) -> float:
        return power(n, abs(difference), level / 2)

    def power_of_equivalence(n: int) -> float:
        return power(n, -above, level_equivalence) + power(n, below, level_equivalence) - 1

    end = _MOST_SEEDS + 1
    for power_of_test in (power_of_difference, power_of_equivalence):
        fewer = range(seeds + 1, end)
        end = seeds + 1 + bisect.bisect_left(fewer, _POWER, key=power_of_test)
    return end if end <= _MOST_SEEDS else None


# ---- The sentence ----


def _sentence(verdict: Verdict, relative_margin: float, alpha: float, adjustments: list[str]) -> str:
    v, (low, high) = verdict, verdict.interval
    decimals = _decimals((high - low) / 2 if high > low else v.effect / 10)
    percent = "" if math.isnan(v.relative_effect) else f" ({_percent(abs(v.relative_effect))})"
    found = f"final metric {_change(v.effect, decimals)}{percent}"
    near, far = sorted(v.interval, key=abs) if low * high > 0 else (low, high)
    start = _number(near, decimals) if low * high > 0 else _change(near, decimals)
    level, ends = f"{100 * (1 - alpha):g} % interval", f"{start} to {_change(far, decimals)}"
    if adjustments:
        ends += f" (adjusted for {' and '.join(adjustments)})"
    seeds = f"{v.seeds} seeds"
    if v.reason:
        text = f"{v.arm} against {v.baseline} is undecided: {found} at every one of {seeds}; seeds change "
        text += f"nothing about it ({v.reason}), so no interval over seeds exists"
    elif v.decision == "undecided":
        needed = f"about {v.seeds_needed}" if v.seeds_needed else f"not even {_MOST_SEEDS}"
        text = f"{v.arm} against {v.baseline} is undecided: {found}, but the {level} is {ends}, {seeds}; "
        text += f"{needed} seeds would settle it, if the effect is as seen"
    elif v.decision == "equivalent":
        zone = f"{100 * relative_margin:g} %" if v.margin is None else f"{v.margin:g}"
        seen = f"{found}, {level} {ends}, {seeds}" if high > low else f"final metric the same at all {seeds}"
        text = f"{v.arm} is equivalent to {v.baseline}, within {zone}: {seen}"
    else:
        text = f"{v.arm} is {v.decision} than {v.baseline}: {found}, {level} {ends}, {seeds}"
    counts = zip(v.diverged, (v.arm, v.baseline), strict=True)
    if lost := " and ".join(f"{count} of {v.seeds} trials of {arm}" for count, arm in counts if count):
        text += f"; {lost} diverged, counted as the worst metric"
    return text + "."


def _decimals(error: float) -> int:
    """Decimals that show two digits of `error`."""
    return max(0, 1 - math.floor(math.log10(abs(error)))) if error else 0


def _number(value: float, decimals: int) -> str:
    size = abs(value)
    if decimals > 6 or size >= 1e6:
        return f"{size:.2e}"
    rounded = f"{size:.{decimals}f}"
    return rounded if float(rounded) or not size else f"{size:.1g}"  # an end near 0 is not written as 0


def _change(value: float, decimals: int) -> str:
    return f"{_number(value, decimals)} {'lower' if value < 0 else 'higher'}" if value else "unchanged"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 1 else f"{100 * share:.{3 if share >= 0.1 else 2}g} %"
