"""Gradient accumulation and McCandlish et al. 2018, appendix A.1, in float64."""

from __future__ import annotations

import numpy as np

DECAY = 0.99


def mean_gradient(gradients: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What one batch of all samples has, where a micro-batch of w samples has the mean over these."""
    samples = sum(w * g for w, g in zip(weights, gradients, strict=True))
    return samples / np.sum(weights)


def effective_count(weights: np.ndarray) -> float:
    """n = (sum w)^2 / sum w^2: the variance of the weighted mean is that of one over n."""
    return np.sum(weights) ** 2 / np.sum(weights**2)


def estimates(gradients: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Equations A.2 and A.3 with B_small = 1 and B_big = n, in micro-batches: |G|^2 and tr(Sigma)."""
    n = effective_count(weights)
    big = np.sum(np.abs(mean_gradient(gradients, weights)) ** 2)
    small = np.sum(weights * np.sum(np.abs(gradients) ** 2, axis=1)) / np.sum(weights)
    return (n * big - small) / (n - 1), (small - big) / (1 - 1 / n)


def noise_scale(emissions: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Ratio of the averages, in which an emission has the weight 1 - 1/n."""
    noises, signals, factor = 0.0, 0.0, 1.0
    for gradients, weights in reversed(emissions):
        if len(weights) < 2:
            continue
        signal, noise = estimates(gradients, weights)
        tells = factor * (1 - 1 / effective_count(weights))
        noises += tells * noise
        signals += tells * signal
        factor *= DECAY
    return noises / signals if signals > 0 else np.nan
