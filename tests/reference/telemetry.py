"""What telemetry measures, from its definitions, in float64.

Trees are flat dicts. `measured` takes one or several leaves and treats them as one vector.
"""

from __future__ import annotations

import numpy as np

from .moments import ema_weights, squared_modulus


def flat(tree, paths):
    """The leaves of a tree as one vector; a complex entry is two real ones."""
    leaves = [np.ravel(tree[path]).astype(np.complex128) for path in paths]
    joined = np.concatenate(leaves) if leaves else np.zeros(0)
    return np.concatenate([joined.real, joined.imag])


def geometry(g, u, p, size):
    """Norms, angle and rates of a gradient g, an update u and parameters p, vectors of `size` entries."""
    inner = g @ u
    norms = np.linalg.norm(g), np.linalg.norm(u), np.linalg.norm(p)
    return {
        "gradient_norm": norms[0],
        "update_norm": norms[1],
        "param_norm": norms[2],
        # Least squares: the a that minimises |u + a g|^2.
        "effective_learning_rate": -inner / norms[0] ** 2 if norms[0] else 0.0,
        "cosine": -inner / (norms[0] * norms[1]) if norms[0] * norms[1] else 0.0,
        "update_to_weight": (norms[1] / size**0.5) / max(norms[2] / size**0.5, 1e-3) if size else 0.0,
    }


def signal_share(history, b1, b2, paths):
    """1 - (estimated variance) / (second moment), sums over the coordinates, from the gradients themselves.

    With weights c_j (of the first moment, normalised) E|m|^2 = |E g|^2 + Var sum_j c_j^2, so that
    E[v - |m|^2] = Var (1 - sum_j c_j^2) for gradients that are drawn from one distribution.
    """
    c, d = (ema_weights([b] * len(history)) for b in (b1, b2))
    c, d = c / c.sum(), d / d.sum()
    second = mean = 0.0
    for path in paths:
        leaves = np.stack([tree[path] for tree in history])
        second += np.tensordot(d, squared_modulus(leaves), axes=1).sum()
        mean += squared_modulus(np.tensordot(c, leaves, axes=1)).sum()
    left = 1 - np.sum(c**2)
    return np.clip(1 - (second - mean) / left / second, 0, 1) if second else 0.0


def rates(v_hat, learning_rate, eps, paths):
    """The effective rates of all coordinates."""
    return np.concatenate([np.ravel(learning_rate / (np.sqrt(v_hat[path]) + eps)) for path in paths])
