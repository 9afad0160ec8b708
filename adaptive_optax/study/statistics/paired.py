"""Statistics of paired differences: Student's t, Holm's correction, the bootstrap, the seeds a test needs.

Rows are arms and columns are seeds; `kept` marks the pairs that count. Values are first divided by a power of
two, which is exact, so that no result depends on the metric's unit and squares and sums do not overflow.
"""

from __future__ import annotations

import bisect
import math
import warnings
from typing import NamedTuple

import numpy as np
from scipy import special, stats

# special.stdtr, stdtrit and nctdtr are what stats.t and stats.nct evaluate, in 2 instead of 40 us per call.

ROUNDING = 4 * np.finfo(np.float64).eps  # relative to the metric; a smaller spread counts as no variance
POWER = 0.8
MOST_SEEDS = 10_000


class Paired(NamedTuple):
    """Student's t of one kind of difference, with one element per arm, in units of 2**exponent."""

    mean: np.ndarray
    error: np.ndarray  # the mean's standard error; 0 where constant
    t: np.ndarray  # mean / error; its limit where constant, 0 or infinite
    constant: np.ndarray  # whether all differences are equal, up to rounding
    exponent: np.ndarray


def exponents(*values: np.ndarray) -> np.ndarray:
    """For each row, the exponent of the power of two that exceeds all magnitudes."""
    return np.frexp(np.max([np.abs(value).max(axis=-1) for value in values], axis=0))[1]


def scaled(values: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Values in units of 2**exponent, with one exponent per row."""
    return np.ldexp(values, -exponent[..., None])


def unscaled(values: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """The inverse of `scaled`, one value per row; values that overflow become the largest finite number."""
    with np.errstate(over="ignore"):
        values = np.ldexp(values, exponent)
    largest = np.finfo(np.float64).max
    return np.where(np.isinf(values), np.copysign(largest, values), values)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and its standard error, excluding NaNs; NaN if there are too few values."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    exponent = exponents(values)
    x = scaled(values, exponent)
    error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    mean, error = (float(unscaled(value, exponent)) for value in (x.mean(), error))
    return mean, error


def column_means(curves: np.ndarray, *, leave_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of every column and its standard error, 0 for a single row.

    A NaN makes its column's mean NaN, or is excluded with `leave_out`; a column of only NaNs has mean NaN.
    """
    curves = np.asarray(curves, float)
    seen = np.isfinite(curves)
    x = np.where(seen, curves, 0.0)
    exponent = exponents(x.T)
    x, count = np.ldexp(x, -exponent), seen.sum(axis=0)
    whole = (count > 0) if leave_out else seen.all(axis=0)
    mean = np.where(whole, x.sum(axis=0) / np.maximum(count, 1), np.nan)
    squares = ((x - mean) ** 2).sum(axis=0, where=seen)
    error = np.sqrt(squares / np.maximum(count - 1, 1) / np.maximum(count, 1))
    return unscaled(mean, exponent), unscaled(np.where(whole, error, np.nan), exponent)


def paired_t(x: np.ndarray, kept: np.ndarray, exponent: np.ndarray) -> Paired:
    """Student's t of the differences `x` along the last axis, in units of 2**exponent.

    With fewer than two kept pairs the results are meaningless.
    """
    count = np.maximum(kept.sum(axis=-1), 1)
    mean = x.sum(axis=-1, where=kept) / count
    spread = np.where(kept, x, -np.inf).max(axis=-1) - np.where(kept, x, np.inf).min(axis=-1)
    constant = (count < 2) | (spread <= ROUNDING)
    squares = ((x - mean[..., None]) ** 2).sum(axis=-1, where=kept)
    error = np.where(constant, 0.0, np.sqrt(squares / np.maximum(count - 1, 1) / count))
    limit = np.where(np.abs(mean) <= ROUNDING, 0.0, np.copysign(np.inf, mean))
    t = np.where(constant, limit, mean / np.where(constant, 1.0, error))
    return Paired(mean, error, t, constant, exponent)


def holm(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns Holm's adjusted p-values, not clipped at 1, and the factor of each (SciPy lacks Holm's method).

    The p-values that belong together are along the last axis.

    factor_i = number of p_j >= p_i;  adjusted_i = maximum of factor_j p_j over p_j <= p_i.
    """
    below = p[..., :, None] <= p[..., None, :]
    factor = below.sum(axis=-1)
    return np.where(below, (factor * p)[..., :, None], 0.0).max(axis=-2), factor


def bootstrap(x: np.ndarray, exponent: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % BCa interval of the mean (Efron 1987); the percentile interval where BCa is undefined.

    BCa is undefined if all differences are equal, or if all resampled means lie on one side of the mean.
    """
    low = high = math.nan
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # the check below handles what they warn about
        for method in ("BCa", "percentile"):
            low, high = stats.bootstrap(
                (x,), np.mean, n_resamples=resamples, method=method, rng=np.random.default_rng(seed)
            ).confidence_interval
            if np.isfinite([low, high]).all():
                break
    return float(unscaled(low, exponent)), float(unscaled(high, exponent))


def seeds_needed(seeds: int, effects: np.ndarray, level: float, level_equivalence: float) -> int | None:
    """Returns the smallest number of seeds, more than `seeds`, at which a test has power 0.8, or None.

    `effects` are mean / standard deviation of a - b, a - above and a - below. The power of the two-sided test
    excludes the chance of deciding for the wrong side. The power of the two one-sided tests together is at
    least the sum of their powers minus 1; it exceeds this only by the chance that both fail, which is
    negligible at the required power.
    """
    difference, above, below = effects

    def power(n: int, effect: float, one_sided: float) -> float:
        """P(T > critical) for noncentral t with n - 1 degrees of freedom and noncentrality effect sqrt(n)."""
        noncentrality = effect * math.sqrt(n)
        if noncentrality <= 0:
            return 0.0
        critical = -special.stdtrit(n - 1, one_sided)
        missed = special.nctdtr(n - 1, noncentrality, critical) if noncentrality < 1e5 else math.nan
        if math.isnan(missed):  # for such large noncentrality only the variance (chi-squared) is random
            return special.chdtr(n - 1, (n - 1) * (noncentrality / critical) ** 2)
        return 1 - missed

    def power_of_difference(n: int) -> float:
        return power(n, abs(difference), level / 2)

    def power_of_equivalence(n: int) -> float:
        return power(n, -above, level_equivalence) + power(n, below, level_equivalence) - 1

    end = MOST_SEEDS + 1
    for power_of_test in (power_of_difference, power_of_equivalence):
        fewer = range(seeds + 1, end)
        end = seeds + 1 + bisect.bisect_left(fewer, POWER, key=power_of_test)
    return end if end <= MOST_SEEDS else None
