"""Polynomial-decay averaging in NumPy float64 (Shamir & Zhang 2013, section 4)."""

import numpy as np


def polynomial_average(iterates, power):
    """The averages of iterates 1, 2, ...: each w_i weighs prod (1 - coefficient) further on, written out."""
    averages = []
    for t in range(1, len(iterates) + 1):
        weights = np.ones(t)
        for i in range(1, t + 1):
            weights[i - 1] = (power + 1) / (i + power)
            for later in range(i + 1, t + 1):
                weights[i - 1] *= 1 - (power + 1) / (later + power)
        averages.append(np.tensordot(weights, np.asarray(iterates[:t], float), axes=1))
    return averages


def corrected_ema(iterates, decays):
    """The averages of iterates 1, 2, ...: sum_i w_i x_i / sum_i w_i with w_i = (1 - b_i) prod_{j > i} b_j."""
    averages = []
    for t in range(1, len(iterates) + 1):
        weights = np.array([(1 - decays[i]) * np.prod(decays[i + 1 : t]) for i in range(t)])
        averages.append(np.tensordot(weights / weights.sum(), np.asarray(iterates[:t], float), axes=1))
    return averages
