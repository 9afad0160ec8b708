"""Adaptive gradient descent (Malitsky & Mishchenko): algorithm 1 of 2020, algorithm 2 of 2023."""

from __future__ import annotations

import numpy as np

RULES = ("2020", "2023")
START = {"2020": np.inf, "2023": 1 / 3}
"""theta_0, the ratio of two learning rates before there are two."""


class AdgdReference:
    """The learning rates lambda_k of x_{k+1} = x_k - lambda_k g_k, for vectors x and g in float64."""

    def __init__(self, initial: float, rule: str = "2020"):
        self.rule = rule
        self.rate = float(initial)
        self.theta = START[rule]
        self.previous: tuple[np.ndarray, np.ndarray] | None = None

    def step(self, x: np.ndarray, g: np.ndarray) -> float:
        """Takes the next iterate and its gradient, and returns the learning rate of the step from there."""
        # At the minimum, to the last digit, x stands still and there is no curvature to see.
        if self.previous is not None and np.any(x != self.previous[0]):
            old_x, old_g = self.previous
            curvature = np.linalg.norm(g - old_g) / np.linalg.norm(x - old_x)
            if self.rule == "2020":
                # lambda_k = min(sqrt(1 + theta_{k-1}) lambda_{k-1}, |x_k - x_{k-1}| / (2 |g_k - g_{k-1}|))
                bound = 1 / (2 * curvature) if curvature > 0 else np.inf
                new = min(np.sqrt(1 + self.theta) * self.rate, bound)
            else:
                # lambda_k = min(sqrt(2/3 + theta_{k-1}) lambda_{k-1},
                #                lambda_{k-1} / sqrt([2 lambda_{k-1}^2 L_k^2 - 1]_+)), with 1 / 0 = inf
                excess = max(2 * self.rate**2 * curvature**2 - 1, 0.0)
                bound = self.rate / np.sqrt(excess) if excess > 0 else np.inf
                new = min(np.sqrt(2 / 3 + self.theta) * self.rate, bound)
            self.theta = new / self.rate  # theta_k = lambda_k / lambda_{k-1}
            self.rate = new
        self.previous = x, g
        return self.rate


def minimise(gradient, x: np.ndarray, steps: int, initial: float, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """The iterates, the first included, and the learning rates."""
    method, xs, rates = AdgdReference(initial, rule), [x], []
    for _ in range(steps):
        g = gradient(xs[-1])
        rates.append(method.step(xs[-1], g))
        xs.append(xs[-1] - rates[-1] * g)
    return np.stack(xs), np.array(rates)
