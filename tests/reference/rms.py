"""RMS scaling: plain (Tieleman & Hinton 2012, lecture 6.5) and centred (Graves 2013, equations 38-40)."""

from __future__ import annotations

import numpy as np

from .moments import MovingAverage, Pooling, Scalar, Tree, as_tree, at_step, squared_modulus

VARIANCE_FLOOR = 0.01
"""Smallest centred second moment, as a fraction of the raw one: it bounds |u| by 1 / sqrt(0.01 (1 - b))."""


class RmsReference:
    """u = g / sqrt(s + eps), or g / (sqrt(s) + eps), with s the second moment of a group of coordinates."""

    def __init__(
        self,
        decay: Scalar = 0.9,
        eps: float = 1e-8,
        initial_scale: float = 0.0,
        eps_in_sqrt: bool = True,
        bias_correction: bool = False,
        centered: bool = False,
        pooling: Pooling | None = None,
    ):
        self.decay = decay
        self.eps = float(eps)
        self.eps_in_sqrt = eps_in_sqrt
        self.bias_correction = bias_correction
        self.centered = centered
        self.pooling = Pooling() if pooling is None else pooling
        self.count = 0
        self.first = MovingAverage()
        self.second = MovingAverage(initial=initial_scale)

    def step(self, grads: Tree) -> Tree:
        """Takes the next gradient and returns the unsigned direction."""
        g = as_tree(grads)
        decay = at_step(self.decay, self.count)
        self.count += 1

        # Graves (38): n_t = b n_{t-1} + (1 - b) g^2, with g^2 pooled over the group.
        self.second.append(self.pooling({path: squared_modulus(leaf) for path, leaf in g.items()}), decay)
        # Graves (39): m_t = b m_{t-1} + (1 - b) g, always per coordinate.
        self.first.append(g, decay)

        v = self.second.debiased() if self.bias_correction else self.second.value()
        s = v
        if self.centered:
            # Graves (40): n - m^2. The mean is taken off coordinate by coordinate, then pooled.
            m = self.first.debiased() if self.bias_correction else self.first.value()
            mean_squared = self.pooling({path: squared_modulus(leaf) for path, leaf in m.items()})
            s = {path: np.maximum(v[path] - mean_squared[path], VARIANCE_FLOOR * v[path]) for path in v}
        return {path: self._scaled(g[path], s[path], v[path]) for path in g}

    def _scaled(self, g: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
        denominator = np.sqrt(s + self.eps) if self.eps_in_sqrt else np.sqrt(s) + self.eps
        # 0 / 0 is 0, whatever eps: a coordinate that has never had a gradient does not move.
        still = (v == 0) & (g == 0)
        return np.where(still, 0, g / np.where(still, 1, denominator))
