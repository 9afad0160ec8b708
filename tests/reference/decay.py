"""Decoupled weight decay, momentum, the optimizers that chain it, and a norm for float64's whole range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .moments import Pooling, Scalar, Tree, as_tree, at_step, weighted_sum
from .rms import RmsReference


def decoupled_step(
    params: Tree,
    direction: Tree,
    *,
    coupling: str,
    learning_rate: float,
    weight_decay: float,
    multiplier: float | None = None,
    mask: Mapping[str, bool] | None = None,
) -> Tree:
    """New parameters after one step against an unsigned direction u, with weight decay lambda.

    learning_rate is the full scheduled rate, alpha eta_t; multiplier is eta_t. A leaf whose mask is False
    is not decayed.

    "learning_rate":  theta - alpha eta_t (u + lambda theta)        PyTorch's AdamW, optax.adamw
    "schedule":       theta - alpha eta_t u - eta_t lambda theta    Loshchilov & Hutter 2019, algorithm 2
    "independent":    theta - alpha eta_t u - lambda theta
    """
    theta = as_tree(params)
    u = as_tree(direction)
    new = {}
    for path in theta:
        decayed = mask is None or mask[path]
        if coupling == "learning_rate":
            fraction = learning_rate * weight_decay
        elif coupling == "schedule":
            fraction = multiplier * weight_decay
        elif coupling == "independent":
            fraction = weight_decay
        else:
            raise ValueError(f"unknown coupling {coupling!r}")
        new[path] = theta[path] - learning_rate * u[path] - (fraction * theta[path] if decayed else 0)
    return new


def trace_weights(decays: Sequence[float]) -> np.ndarray:
    """prod_{i > j} mu_i for j = 1, ..., k: what is left of the j-th term; mu^{k-j} if mu is constant."""
    weights = np.ones(len(decays))
    for j in reversed(range(len(decays) - 1)):
        weights[j] = weights[j + 1] * decays[j + 1]
    return weights


class TraceReference:
    """Heavy-ball momentum (Polyak 1964): t_k = mu_k t_{k-1} + g_k, as the explicit sum of all its terms.

    With nesterov, g_k + mu_k t_k (Sutskever et al. 2013, in the form of optax and PyTorch). The decay may be
    a function of the 0-based step.
    """

    def __init__(self, decay: Scalar, nesterov: bool = False):
        self.decay = decay
        self.nesterov = nesterov
        self.decays: list[float] = []
        self.history: list[Tree] = []

    def step(self, grads: Tree) -> Tree:
        """Takes the next term and returns the trace."""
        g = as_tree(grads)
        decay = at_step(self.decay, len(self.decays))
        self.decays.append(decay)
        self.history.append(g)
        trace = weighted_sum(trace_weights(self.decays), self.history)
        if self.nesterov:
            return {path: g[path] + decay * trace[path] for path in g}
        return trace


class SgdReference:
    """Delta = -learning_rate * trace(g): the momentum comes before the learning rate."""

    def __init__(self, learning_rate: Scalar, momentum: Scalar | None = None, nesterov: bool = False):
        self.learning_rate = learning_rate
        self.trace = None if momentum is None else TraceReference(momentum, nesterov)
        self.count = 0

    def step(self, grads: Tree) -> Tree:
        """Takes the next gradient and returns what is added to the parameters."""
        direction = as_tree(grads) if self.trace is None else self.trace.step(grads)
        learning_rate = at_step(self.learning_rate, self.count)
        self.count += 1
        return {path: -learning_rate * leaf for path, leaf in direction.items()}


class RmspropReference:
    """Delta = trace(-learning_rate * u): momentum comes after the learning rate (Graves (40), optax)."""

    def __init__(
        self,
        learning_rate: Scalar,
        decay: Scalar = 0.9,
        eps: float = 1e-8,
        initial_scale: float = 0.0,
        eps_in_sqrt: bool = True,
        centered: bool = False,
        momentum: Scalar | None = None,
        nesterov: bool = False,
        bias_correction: bool = False,
        pooling: Pooling | None = None,
    ):
        self.learning_rate = learning_rate
        self.rms = RmsReference(decay, eps, initial_scale, eps_in_sqrt, bias_correction, centered, pooling)
        self.trace = None if momentum is None else TraceReference(momentum, nesterov)
        self.count = 0

    def step(self, grads: Tree) -> Tree:
        """Takes the next gradient and returns what is added to the parameters."""
        direction = self.rms.step(grads)
        learning_rate = at_step(self.learning_rate, self.count)
        self.count += 1
        scaled = {path: -learning_rate * leaf for path, leaf in direction.items()}
        return scaled if self.trace is None else self.trace.step(scaled)


def global_norm(tree: Tree) -> float:
    """The Euclidean norm over all leaves, from 1e-300 to 1e300; NaN and infinity propagate, NaN first.

    S = 2^floor(log2 max|x|) scales every component exactly, so S sqrt(sum (x / S)^2) cannot over- or
    underflow before the last product. The sum is rounded once.
    """
    parts = [np.empty(0)]
    for leaf in as_tree(tree).values():
        parts.append(leaf.real.ravel())
        parts.append(leaf.imag.ravel())
    x = np.abs(np.concatenate(parts))
    if np.any(np.isnan(x)):
        return float("nan")
    largest = float(x.max(initial=0.0))
    if largest == 0 or math.isinf(largest):
        return largest
    exponent = math.frexp(largest)[1] - 1
    squares = [math.ldexp(component, -exponent) ** 2 for component in x.tolist()]
    return math.ldexp(math.sqrt(math.fsum(squares)), exponent)
