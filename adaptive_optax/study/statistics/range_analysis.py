"""Analyzes short trials at constant rates: where training is stable, where it descends, where to start."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

UNSTABLE_RATIO = 3.0  # an unstable trial's training loss exceeds the usual peak by this factor
LOST_DESCENT = 0.5  # share of the best descent; a trial that keeps more is stable, however it got there
BEST_TO_PEAK = 0.5  # ratio of the suggestion to the best rate in a short trial


class Analysis(NamedTuple):
    """The analysis of constant-rate trials; undefined rates are NaN.

    Attributes:
        suggestion: Half the rate with the lowest final loss, as a geometric mean over seeds.
        interval: The 95 % t interval of the suggestion over seeds, in the logarithm of the rate. It covers
            variation between seeds, not the factor of a half, nor other lengths of trials.
        steepest: Where the mean final loss falls fastest with the logarithm of the rate.
        largest_stable: The geometric mean of the last stable rate and the first unstable one.
        unstable: Which trials are unstable, [rate, seed].
        declined: Why there is no suggestion, or None.
    """

    suggestion: float
    interval: tuple[float, float]
    steepest: float
    largest_stable: float
    unstable: np.ndarray
    declined: str | None


def analyze(rates: np.ndarray, initial: np.ndarray, final: np.ndarray, training: np.ndarray) -> Analysis:
    r"""Analyzes trials at constant rates.

    **Stable.** A trial is unstable if a loss is not finite, or if it ends with at most half of the descent of
    the seed's best trial and its training loss is not stationary. Let $P_1, P_2$ be the peaks in the
    first and the second half, above the lowest loss of all, and P the usual peak (the larger of the initial
    loss and the peak at the lowest rate). The loss is not stationary if

    $$
    \max(P_1, P_2) > 3 \max(\min(P_1, P_2), P).
    $$

    $P_2 > P_1$ means a growing loss; $P_1 > P_2$ means one that exploded and settled on a
    plateau, as in networks, which seldom overflow. A quadratic's noise floor may be far above the initial
    loss, but it is stationary, and so stable. A rate is unstable if one of its trials is not finite or half
    of them are unstable. Only the rates below the first unstable one are used below.

    **Suggestion.** Each seed's best rate is the minimum of its final loss, by a parabola through the lowest
    point and its neighbours. Short trials prefer larger rates than long runs: half the best rate lost least
    in the worst case on a small network (SGD, momentum, Adam; constant and decaying rates; runs 3 to 30 times
    as long). The suggestion cannot exceed half the largest stable rate. The steepest rate is not used: on a
    quadratic of curvature h it is 1/(2hT) after T steps, which says more about T than about h.

    Args:
        rates: [rate], ascending and evenly spaced in the logarithm.
        initial: [seed], the loss on the probe set before training.
        final: [rate, seed], the loss on the probe set after training.
        training: [rate, seed, window], the training losses.
    """
    x, losses = np.log(rates), np.where(np.isfinite(final), final, np.inf)
    finite = np.isfinite(final) & np.all(np.isfinite(training), axis=2)
    unstable = ~finite | _is_unstable(initial, losses, np.where(finite[..., None], training, np.inf))
    bad = ~np.all(finite, axis=1) | (np.mean(unstable, axis=1) >= 0.5)
    stable = int(np.argmax(bad)) if bad.any() else len(rates)  # the number of rates below the first bad one
    limit = math.exp(x[stable - 1 : stable + 1].mean()) if 0 < stable < len(rates) else math.nan

    x, losses = x[:stable], losses[:stable]
    mean = losses.mean(axis=1)
    steepest = math.nan
    if stable > 1 and np.min(slopes := np.diff(mean) / np.diff(x)) < 0:
        steepest = math.exp(_lowest((x[1:] + x[:-1]) / 2, slopes))
    declined = _reason_to_decline(rates, initial, losses, finite)
    if declined is not None:
        return Analysis(math.nan, (math.nan, math.nan), steepest, limit, unstable, declined)
    best = np.array([_lowest(x, of_seed) for of_seed in losses.T])
    suggestion, interval = geometric_mean(BEST_TO_PEAK * np.exp(best), spacing=float(x[1] - x[0]))
    return Analysis(suggestion, interval, steepest, limit, unstable, None)


def _is_unstable(initial: np.ndarray, final: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Which finite trials, [rate, seed], lost their descent and are not stationary; see `analyze`."""
    descent = initial - final
    keeps = descent > LOST_DESCENT * descent.max(axis=0)
    lowest = min(training.min(), final.min(), initial.min())
    half = training.shape[2] // 2
    first = training[..., :half].max(axis=2, initial=lowest) - lowest
    second = training[..., half:].max(axis=2) - lowest
    high, low = np.maximum(first, second), np.minimum(first, second)
    usual = np.maximum(initial - lowest, np.where(np.isfinite(high[0]), high[0], 0))
    return ~keeps & (high > UNSTABLE_RATIO * np.maximum(low, usual))


def _reason_to_decline(
    rates: np.ndarray, initial: np.ndarray, stable_losses: np.ndarray, finite: np.ndarray
) -> str | None:
    if not np.all(np.isfinite(initial)):
        return "the loss is not finite before training"
    if not finite.any():
        return f"every trial diverges, even at {rates[0]:.2g}: lower low"
    if not len(stable_losses):
        return f"training is unstable even at the lowest rate, {rates[0]:.2g}: lower low"
    best, seeds = int(np.argmin(stable_losses.mean(axis=1))), len(initial)
    fell = int(np.sum(stable_losses[best] < initial))
    if stats.binom.sf(fell - 1, seeds, 0.5) > max(0.05, 0.5**seeds):  # a sign test over seeds
        where = f"at the best rate, {rates[best]:.2g}"
        return f"training does not descend: {where}, the loss falls in only {fell} of {seeds} seeds"
    if best == 0:
        return f"the loss is lowest at the lowest rate, {rates[0]:.2g}: lower low"
    if best == len(rates) - 1:
        return f"the loss is lowest at the highest rate, {rates[-1]:.2g}: raise high"
    return None


def _lowest(x: np.ndarray, y: np.ndarray) -> float:
    """The x of the minimum: the vertex of the parabola through the lowest point and its neighbours."""
    i = int(np.argmin(y))
    if i in (0, len(y) - 1):
        return float(x[i])
    curvature = y[i - 1] - 2 * y[i] + y[i + 1]
    shift = (y[i - 1] - y[i + 1]) / (2 * curvature) if curvature > 0 else 0.0  # within half a spacing
    return float(x[i] + shift * (x[i + 1] - x[i]))


def geometric_mean(rates: np.ndarray, spacing: float = 0.0) -> tuple[float, tuple[float, float]]:
    """The geometric mean of one rate per seed, and its interval; NaNs are excluded.

    A rate read off a grid is rounded, so one twelfth of the squared `spacing` is added to the variance.
    """
    logs = np.log(rates[np.isfinite(rates)])
    if len(logs) < 2:
        return (math.exp(logs[0]) if len(logs) else math.nan), (math.nan, math.nan)
    error = math.sqrt((logs.var(ddof=1) + spacing**2 / 12) / len(logs))
    center, half = logs.mean(), stats.t.ppf(0.975, len(logs) - 1) * error
    return math.exp(center), (math.exp(center - half), math.exp(center + half))
