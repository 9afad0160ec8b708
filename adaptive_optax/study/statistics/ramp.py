"""The classic range test: one trial whose rate grows, and fastai's rules for reading such a curve."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from adaptive_optax._core.checks import check_choice

_SLIDE_WIDTH, _SLIDE_THRESHOLD = 15, 0.005
_FEWEST_POINTS = {"steepest": 2, "valley": 1, "slide": _SLIDE_WIDTH + 1, "minimum": 1}


def suggest(learning_rates: ArrayLike, losses: ArrayLike, rule: str) -> float:
    r"""Reads a learning rate off a curve of losses by one of fastai's four rules.

    Use it for curves recorded by another finder, or to compare the rules. The curve is used unchanged:
    fastai's `lr_find` and `lr_range_test(..., ramp=True)` first smooth the losses and drop the first tenth of
    the steps and the last five points. The rule picks a point by its index, from 0:

    * `"steepest"`: the left end of the interval with the least $\Delta L / \Delta\log\eta$;
    * `"valley"`: a third plus half a third into the longest decreasing subsequence. With its length $\ell$
      and its last index $e$ (the first index to reach that length), it is
      $e - \ell + \lfloor\ell/3\rfloor + \lfloor\ell/6\rfloor$; 0 if nothing decreases;
    * `"slide"`: the left end of a window of width 15, which moves left from the end of the curve while the
      gradients $\Delta L / \Delta i$ at its two ends differ by more than 0.005;
    * `"minimum"`: the lowest loss; a tenth of that rate is suggested.

    An index of -1, which `"valley"` gives for a curve that falls only in its first step, means the last
    point, as in fastai. Among equal values the first counts.

    Args:
        learning_rates: Rates above 0, increasing.
        losses: Finite losses, one per rate.
        rule: The rule. `"slide"` needs 16 points, `"steepest"` 2, the others 1.

    Raises:
        ValueError: If an argument does not meet these conditions.

    Examples:
        >>> rates = [1e-4, 1e-3, 1e-2, 1e-1]
        >>> suggest(rates, [2.0, 1.9, 1.0, 0.9], "steepest"), suggest(rates, [2.0, 1.9, 1.0, 3.0], "minimum")
        (0.001, 0.001)

    Source: fastai 2 (Howard and Gugger 2020), `fastai.callback.schedule`.
    """
    check_choice("rule", rule, _FEWEST_POINTS)
    rates, curve = np.asarray(learning_rates, np.float64), np.asarray(losses, np.float64)
    if rates.ndim != 1 or rates.shape != curve.shape:
        raise ValueError(
            f"losses must hold one number for each learning rate, got shapes {curve.shape} and {rates.shape}."
        )
    if len(rates) < (fewest := _FEWEST_POINTS[rule]):
        raise ValueError(f"losses must have at least {fewest} points for rule {rule!r}, got {len(rates)}.")
    wrong = ~(np.diff(rates, prepend=0.0) > 0) | ~np.isfinite(rates)
    if np.any(wrong):
        at = int(np.argmax(wrong))
        raise ValueError(
            f"learning_rates must be finite, above 0 and increasing, got {rates[at]} at index {at}."
        )
    if not np.all(np.isfinite(curve)):
        at = int(np.argmin(np.isfinite(curve)))
        raise ValueError(f"losses must be finite, got {curve[at]} at index {at}: cut the curve there.")
    index = {"steepest": _steepest, "valley": _valley, "slide": _slide, "minimum": _minimum}[rule]
    rate = float(rates[index(rates, curve)])
    return rate / 10 if rule == "minimum" else rate


def _steepest(rates: np.ndarray, losses: np.ndarray) -> int:
    return int(np.argmin(np.diff(losses) / np.diff(np.log(rates))))


def _minimum(rates: np.ndarray, losses: np.ndarray) -> int:
    return int(np.argmin(losses))


def _valley(rates: np.ndarray, losses: np.ndarray) -> int:
    lengths = np.ones(len(losses), int)  # of the longest decreasing subsequence ending here
    for i in range(1, len(losses)):
        lengths[i] += np.max(lengths[:i], where=losses[:i] > losses[i], initial=0)
    length, end = int(np.max(lengths)), int(np.argmax(lengths))
    return end - length + length // 3 + length // 6 if length > 1 else 0


def _slide(rates: np.ndarray, losses: np.ndarray) -> int:
    slopes = np.gradient(losses)
    right, index = -1, -1 - _SLIDE_WIDTH
    left = index
    while left >= -len(losses) and abs(slopes[right] - slopes[left]) > _SLIDE_THRESHOLD:
        index, right, left = left, right - 1, left - 1
    return index


SMOOTHING, STOP_RATIO, DROPPED_END = 0.98, 4.0, 5  # fastai's


def read_ramp(rates: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    r"""Smooths the losses of one ramp, stops it where fastai would, and applies the rules.

    $$
    a_i = \beta a_{i-1} + (1 - \beta) L_i, \qquad \hat L_i = a_i / (1 - \beta^{i+1}), \quad \beta = 0.98
    $$

    The ramp ends at the first point that is not finite or above 4 times the lowest earlier one. The rules use
    it without the first tenth of the planned steps and without its last five points; a rule that needs more
    points than remain yields NaN.

    Returns:
        The smoothed losses, ending with the one that stopped the ramp; and the rate by each rule, with the
        rate where the ramp stopped as `"stop"` (NaN if nothing stopped it).
    """
    smoothed, average, best, stop = [], 0.0, math.inf, math.nan
    for i, loss in enumerate(losses.tolist()):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING ** (i + 1)))
        best = min(best, smoothed[-1])
        if not math.isfinite(smoothed[-1]) or smoothed[-1] > STOP_RATIO * best > 0:
            stop = float(rates[i])
            break
    kept = slice(len(losses) // 10, max(len(smoothed) - DROPPED_END, 0))
    read = {"stop": stop}
    for rule, fewest in _FEWEST_POINTS.items():
        curve = smoothed[kept]
        read[rule] = suggest(rates[: len(smoothed)][kept], curve, rule) if len(curve) >= fewest else math.nan
    return np.array(smoothed), read
