"""Gradient accumulation and McCandlish et al. 2018, appendix A.1, in float64."""

from __future__ import annotations

import numpy as np

DECAY = 0.99


def mean_gradient(gradients: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What one batch of all samples has, where a micro-batch of w samples has the mean over these."""
    samples = sum(w * g for w, g in zip(weights, gradients, strict=True))
    return samples / np.sum(weights)


def estimates(gradients: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Equations A.2 and A.3: |G|^2 and, of one sample, S = tr(Sigma).

    The small batch has the mean number of samples, and the expected |g|^2 for it is estimated with a part for
    every sample: E|g_i|^2 = |G|^2 + S / w_i, so sum w_i |g_i|^2 / W has the mean |G|^2 + S k / W.
    """
    big = np.sum(weights)
    small = big / len(weights)
    big_square = np.sum(np.abs(mean_gradient(gradients, weights)) ** 2)
    small_square = np.sum(weights * np.sum(np.abs(gradients) ** 2, axis=1)) / big
    signal = (big * big_square - small * small_square) / (big - small)
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return signal, noise


def noise_scale(emissions: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Ratio of the averages, with the emission's mean weight as a part of its weight, in mean micro-batches.

    In samples it is average(S) / average(|G|^2); a sample's S over |G|^2 times the mean weight is the same
    in micro-batches.
    """
    noises, signals, factor = 0.0, 0.0, 1.0
    for gradients, weights in reversed(emissions):
        if len(weights) < 2:
            continue
        signal, noise = estimates(gradients, weights)
        noises += factor * noise
        signals += factor * signal * np.mean(weights)
        factor *= DECAY
    return noises / signals if signals > 0 else np.nan
