"""Batch growth in plain Python, and the risk of SGD on a noisy quadratic in closed form."""

from __future__ import annotations

import math


def grow(rates: list[float], max_factor: int, kind: str) -> list[tuple[int, float]]:
    """The emissions (k, rate): the most steps whose largest rate allows it, with the rules of the papers.

    Smith et al. 2018: B grows as the rate would have fallen, lr / B as in the decayed run. Malladi et al.
    2022: lr / sqrt(B) as in it. The decayed run's rate is the mean over the emission's steps.
    """
    top, begin, emissions = max(rates), 0, []
    while begin < len(rates):
        allowed = []
        for k in range(1, min(max_factor, len(rates) - begin) + 1):
            largest = max(rates[begin : begin + k])
            scaled = largest * (k if kind == "sgd" else math.sqrt(k))
            warming_up = top in rates[begin + 1 :] and top not in rates[: begin + 1]
            if k == 1 or (scaled <= top * (1 + 1e-5) and not warming_up):
                allowed.append(k)
        k = max(allowed)
        mean = sum(rates[begin : begin + k]) / k
        emissions.append((k, mean * (k if kind == "sgd" else math.sqrt(k))))
        begin += k
    return emissions


def risk(steps: list[tuple[float, float]], curvature: float, noise: float, start: float) -> float:
    """E x^2 after steps (batch, rate) on h x^2 / 2 with gradients h x + N(0, c / batch).

    x' = (1 - a h) x - a n gives E' = (1 - a h)^2 E + a^2 c / batch.
    """
    expected = start
    for batch, rate in steps:
        expected = (1 - rate * curvature) ** 2 * expected + rate**2 * noise / batch
    return expected
