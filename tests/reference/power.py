"""The power of paired t-tests, by integrating over the variance."""

import math

import numpy as np
from scipy import integrate, stats

ALPHA = 0.05


def equivalence_power(n, effect, margin, alpha=ALPHA):
    """Exact power of the two one-sided tests for n normal differences of variance 1.

    P(mean + t s / sqrt(n) < margin and mean - t s / sqrt(n) > -margin), where the mean is independent of s
    and s sqrt(n - 1) has the chi distribution with n - 1 degrees of freedom.
    """
    critical = stats.t.isf(alpha, n - 1)

    def given_s(s):
        room = margin - critical * s / math.sqrt(n)
        low, high = ((end - effect) * math.sqrt(n) for end in (-room, room))
        return (stats.norm.cdf(high) - stats.norm.cdf(low)) * stats.chi.pdf(s * math.sqrt(n - 1), n - 1)

    largest = margin * math.sqrt(n) / critical  # beyond it no mean is inside
    grid = np.linspace(0, min(largest, 1 + 12 / math.sqrt(n)), 2001)
    return integrate.simpson(given_s(grid), x=grid) * math.sqrt(n - 1)


def difference_power(n, effect, alpha=ALPHA):
    critical, noncentrality = stats.t.isf(alpha / 2, n - 1), effect * math.sqrt(n)
    return stats.nct.sf(critical, n - 1, noncentrality) + stats.nct.cdf(-critical, n - 1, noncentrality)
