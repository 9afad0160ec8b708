"""Adam (Kingma & Ba 2015, algorithm 1) and its variants, and the tight bound on its direction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .moments import MovingAverage, Pooling, Scalar, Tree, as_tree, at_step, ema_weights, squared_modulus


class AdamReference:
    """u = m_hat / (sqrt(v_hat + eps_root) + eps), with v pooled over groups of coordinates.

    b1, b2 and eps may be functions of the 0-based step. With w1 and w2 the weight sums of the two averages
    (1 - b1^t and 1 - b2^t where the decays are constant):

    eps_form "paper":       m_hat / (sqrt(v_hat + eps_root) + eps),  m_hat = m / w1,  v_hat = v / w2
    eps_form "tensorflow":  (sqrt(w2) / w1) m / (sqrt(v + eps_root) + eps)   (Kingma & Ba, end of section 2)
    """

    def __init__(
        self,
        b1: Scalar = 0.9,
        b2: Scalar = 0.999,
        eps: Scalar = 1e-8,
        eps_root: float = 0.0,
        eps_form: str = "paper",
        nesterov: bool = False,
        amsgrad: bool = False,
        bias_correction: bool = True,
        pooling: Pooling | None = None,
    ):
        if eps_form not in ("paper", "tensorflow"):
            raise ValueError(f"unknown eps_form {eps_form!r}")
        self.b1 = b1
        self.b2 = b2
        self.eps = eps
        self.eps_root = float(eps_root)
        self.eps_form = eps_form
        self.nesterov = nesterov
        self.amsgrad = amsgrad
        self.bias_correction = bias_correction
        self.pooling = Pooling() if pooling is None else pooling
        self.count = 0
        self.first = MovingAverage()
        self.second = MovingAverage()
        self.second_max: Tree | None = None

    def step(self, grads: Tree) -> Tree:
        """Takes the next gradient and returns the unsigned direction."""
        g = as_tree(grads)
        b1 = at_step(self.b1, self.count)
        b2 = at_step(self.b2, self.count)
        eps = at_step(self.eps, self.count)
        self.count += 1

        # Algorithm 1: m_t = b1 m_{t-1} + (1 - b1) g_t and v_t = b2 v_{t-1} + (1 - b2) g_t^2, g_t^2 pooled.
        self.first.append(g, b1)
        self.second.append(self.pooling({path: squared_modulus(leaf) for path, leaf in g.items()}), b2)
        m_hat = self._numerator(g, b1)

        # Algorithm 1: v_hat = v / w2. The TensorFlow form leaves v as it is and multiplies by sqrt(w2) below.
        correct_v = self.bias_correction and self.eps_form == "paper"
        v_hat = self.second.debiased() if correct_v else self.second.value()
        if self.amsgrad:
            # Reddi, Kale & Kumar 2018, algorithm 2: v_max_t = max(v_max_{t-1}, v_t), v_max_0 = 0.
            if self.second_max is not None:
                v_hat = {path: np.maximum(self.second_max[path], v_hat[path]) for path in v_hat}
            self.second_max = v_hat

        factor = 1.0
        if self.bias_correction and self.eps_form == "tensorflow":
            factor = np.sqrt(self.second.weight)
        return {path: factor * self._ratio(m_hat[path], v_hat[path], eps) for path in g}

    def _numerator(self, g: Tree, b1: float) -> Tree:
        m = self.first.value()
        if not self.bias_correction:
            if self.nesterov:
                return {path: b1 * m[path] + (1 - b1) * g[path] for path in g}
            return m
        w1 = self.first.weight
        if self.nesterov:
            # Dozat 2016, algorithm 2, with b1 in place of mu_t and mu_{t+1}: the first moment is divided by
            # the weight sum one step ahead, 1 - b1^{t+1} where b1 is constant.
            w1_next = float(ema_weights([*self.first.decays, b1]).sum())
            return {path: b1 * m[path] / w1_next + (1 - b1) * g[path] / w1 for path in g}
        return {path: m[path] / w1 for path in g}

    def _ratio(self, m: np.ndarray, v: np.ndarray, eps: float) -> np.ndarray:
        # 0 / 0 is 0, whatever eps: a coordinate that has never had a gradient does not move.
        still = (v == 0) & (m == 0)
        return np.where(still, 0, m / np.where(still, 1, np.sqrt(v + self.eps_root) + eps))


def direction_weights(
    b1s: Sequence[float], b2s: Sequence[float], bias_correction: bool = True, nesterov: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The weights (c, w) of Adam's direction sum_j c_j g_j / sqrt(sum_j w_j g_j^2), oldest first."""
    b1 = float(b1s[-1])
    c = ema_weights(b1s)
    w = ema_weights(b2s)
    last = np.zeros_like(c)
    last[-1] = 1.0
    if bias_correction:
        if nesterov:
            w1_next = float(ema_weights([*b1s, b1]).sum())
            c = b1 * c / w1_next + (1 - b1) * last / c.sum()
        else:
            c = c / c.sum()
        w = w / w.sum()
    elif nesterov:
        c = b1 * c + (1 - b1) * last
    return c, w


def tight_bound(
    b1s: Sequence[float], b2s: Sequence[float], bias_correction: bool = True, nesterov: bool = False
) -> float:
    """The largest |direction| that any gradient sequence can give after len(b1s) steps, with eps = 0.

    By Cauchy-Schwarz, |sum_j c_j g_j| = |sum_j (c_j / sqrt(w_j)) (sqrt(w_j) g_j)|
    <= sqrt(sum_j c_j^2 / w_j) sqrt(sum_j w_j g_j^2), with equality iff g_j is proportional to c_j / w_j.
    """
    c, w = direction_weights(b1s, b2s, bias_correction, nesterov)
    used = c != 0
    if np.any(w[used] == 0):
        return float("inf")
    return float(np.sqrt(np.sum(c[used] * (c[used] / w[used]))))


def extremal_sequence(
    b1: float | Sequence[float],
    b2: float | Sequence[float],
    n: int,
    *,
    bias_correction: bool = True,
    nesterov: bool = False,
) -> np.ndarray:
    """n gradients, the largest 1, whose direction after the last one attains the bound: g_j = c_j / w_j."""
    b1s = np.broadcast_to(np.asarray(b1, np.float64), (n,))
    b2s = np.broadcast_to(np.asarray(b2, np.float64), (n,))
    c, w = direction_weights(list(b1s), list(b2s), bias_correction, nesterov)
    g = np.zeros(n)
    used = c != 0
    g[used] = c[used] / w[used]
    return g / np.max(np.abs(g))
