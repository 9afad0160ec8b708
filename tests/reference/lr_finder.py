"""fastai's four learning-rate rules and the ramp's smoothing, slow and from their definitions.

fastai (Howard and Gugger 2020) calls the first rule "steep". All indices are Python's: a negative one counts
from the end, which fastai relies on.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The left end of the interval whose loss falls fastest in the logarithm of the rate."""
    logs = np.log(np.asarray(rates, np.float64)).tolist()
    best, found = None, 0
    for i in range(len(losses) - 1):
        slope = (losses[i + 1] - losses[i]) / (logs[i + 1] - logs[i])
        if best is None or slope < best:
            best, found = slope, i
    return rates[found]


def valley(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A third and a sixth, each rounded down, into the longest decreasing subsequence.

    The subsequence is taken to begin `length` before its end, whatever gaps it has, and to end at the first
    index at which this length is reached. Lengths come from patience sorting: `piles[k]` is the largest
    value, negated, that ends a decreasing subsequence of length k + 1.
    """
    piles: list[float] = []
    length, end = 0, 0
    for i, loss in enumerate(losses):
        at = bisect.bisect_left(piles, -loss)
        piles[at : at + 1] = [-loss]
        if len(piles) > length:
            length, end = len(piles), i
    if length == 1:
        return rates[0]  # fastai begins with start = end = 0 and never moves them
    start = end - length
    third = (end - start) / 3
    return rates[start + int(third) + int(third / 2)]


def slide(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The left end of a window of 15 intervals, moved left while the slopes at its ends differ by > 0.005."""
    n = len(losses)
    slopes = [losses[1] - losses[0]]
    slopes += [(losses[i + 1] - losses[i - 1]) / 2 for i in range(1, n - 1)]
    slopes += [losses[n - 1] - losses[n - 2]]
    found, shift = rates[n - 16], 0
    while shift <= n - 16 and abs(slopes[n - 1 - shift] - slopes[n - 16 - shift]) > 0.005:
        found = rates[n - 16 - shift]
        shift += 1
    return found


def minimum(rates: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the rate with the lowest loss."""
    return rates[list(losses).index(min(losses))] / 10


def smoothed(losses: Sequence[float], decay: float = 0.98) -> list[float]:
    """The weighted means sum_j decay^(i-j) L_j / sum_j decay^(i-j): a debiased moving average."""
    means = []
    for i in range(len(losses)):
        weights = decay ** np.arange(i, -1, -1.0)
        means.append(float(np.dot(weights, losses[: i + 1]) / weights.sum()))
    return means
