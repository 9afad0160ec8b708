"""Pooled statistics and moving averages, written out from their definitions.

A tree is a flat dict from a path to an array. Everything is float64 (complex128 for complex leaves), and a
pooled statistic is returned at every coordinate, whatever shape an implementation keeps it in.

A moving average is not computed by its recursion. With decays b_1, ..., b_t, unrolling
x_t = b_t x_{t-1} + (1 - b_t) q_t gives

    x_t = (prod_k b_k) x_0 + sum_j c_j q_j,    c_j = (1 - b_j) prod_{k > j} b_k        (1)

and each step evaluates that sum over the whole history. For stationary q and x_0 = 0 the expectation of x_t
is E[q] sum_j c_j, so dividing by the weight sum removes the bias for any sequence of decays (Kingma & Ba
2015, section 3, where all b_j are equal and the sum is 1 - b^t).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

Tree = dict[str, np.ndarray]
Scalar = float | Callable[[int], float]


def as_tree(tree: Mapping[str, object]) -> Tree:
    """Converts every leaf to float64, or to complex128 where it is complex."""
    leaves = {path: np.asarray(leaf) for path, leaf in tree.items()}
    return {
        path: leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
        for path, leaf in leaves.items()
    }


def at_step(value: Scalar, step: int) -> float:
    """The value of a number or of a schedule at a 0-based step."""
    return float(value(step)) if callable(value) else float(value)


def squared_modulus(x: np.ndarray) -> np.ndarray:
    """|x|^2: for complex x the sum of the squares of both components, a real number."""
    return x.real**2 + x.imag**2


@dataclasses.dataclass(frozen=True)
class Pooling:
    """Which coordinates share one statistic.

    kind: "coordinate", "axis", "tensor", "labels" or "global".
    axes: for "axis", the axes of each leaf to share along. A leaf that lacks one of them is not pooled.
    labels: for "labels", a dict from a path to its label.
    reduce: "mean" divides a group's sum by its number of coordinates; "sum" does not.
    """

    kind: str = "coordinate"
    axes: tuple[int, ...] = ()
    labels: Mapping[str, Hashable] | None = None
    reduce: str = "mean"

    def __call__(self, values: Tree) -> Tree:
        """Replaces every coordinate by its group's mean (or sum)."""
        if self.kind not in ("coordinate", "axis", "tensor", "labels", "global"):
            raise ValueError(f"unknown kind {self.kind!r}")
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"unknown reduce {self.reduce!r}")
        if any(np.iscomplexobj(value) for value in values.values()):
            raise TypeError("statistics are real")
        if self.kind == "coordinate":
            return {path: value.copy() for path, value in values.items()}
        if self.kind == "axis":
            return {path: self._over_axes(value) for path, value in values.items()}
        if self.kind == "tensor":
            group_of = {path: path for path in values}
        elif self.kind == "labels":
            group_of = {path: self.labels[path] for path in values}
        else:
            group_of = {path: None for path in values}
        return self._over_leaves(values, group_of)

    def _over_axes(self, value: np.ndarray) -> np.ndarray:
        if any(not -value.ndim <= axis < value.ndim for axis in self.axes):
            return value.copy()
        axes = tuple(sorted({axis % value.ndim for axis in self.axes}))
        total = value.sum(axis=axes, keepdims=True)
        count = int(np.prod([value.shape[axis] for axis in axes], dtype=int))
        return np.broadcast_to(self._reduced(total, count), value.shape).copy()

    def _over_leaves(self, values: Tree, group_of: Mapping[str, Hashable]) -> Tree:
        # sum over all coordinates of the group / number of all coordinates of the group: a large leaf
        # counts for more than a small one, which a mean of the leaves' means would not do.
        totals: dict[Hashable, float] = {}
        counts: dict[Hashable, int] = {}
        for path, value in values.items():
            group = group_of[path]
            totals[group] = totals.get(group, 0.0) + float(value.sum())
            counts[group] = counts.get(group, 0) + value.size
        return {
            path: np.full(value.shape, self._reduced(totals[group_of[path]], counts[group_of[path]]))
            for path, value in values.items()
        }

    def _reduced(self, total, count: int):
        return total / max(count, 1) if self.reduce == "mean" else total


def ema_weights(decays: Sequence[float]) -> np.ndarray:
    """c_j = (1 - b_j) prod_{k > j} b_k of equation (1), for j = 1, ..., t."""
    b = np.asarray(decays, np.float64)
    weights = np.zeros_like(b)
    product = 1.0
    for j in reversed(range(len(b))):
        weights[j] = (1 - b[j]) * product
        product *= b[j]
    return weights


def initial_weight(decays: Sequence[float]) -> float:
    """prod_k b_k of equation (1): what is left of the initial value."""
    return float(np.prod(np.asarray(decays, np.float64)))


def weighted_sum(weights: np.ndarray, history: Sequence[Tree]) -> Tree:
    """sum_j weights_j history_j, leaf by leaf."""
    return {
        path: np.tensordot(weights, np.stack([tree[path] for tree in history]), axes=1) for path in history[0]
    }


class MovingAverage:
    """An exponential moving average that keeps its whole history; `decays` may change at every step."""

    def __init__(self, initial: float = 0.0):
        self.initial = float(initial)
        self.decays: list[float] = []
        self.history: list[Tree] = []

    def append(self, statistic: Tree, decay: float) -> None:
        """Adds the next statistic q_t and its decay b_t."""
        self.decays.append(float(decay))
        self.history.append({path: np.array(leaf) for path, leaf in statistic.items()})

    @property
    def weight(self) -> float:
        """sum_j c_j: 1 - b^t where the decay is constant."""
        return float(ema_weights(self.decays).sum())

    def value(self) -> Tree:
        """x_t of equation (1), with the initial value."""
        left = initial_weight(self.decays) * self.initial
        total = weighted_sum(ema_weights(self.decays), self.history)
        return {path: left + leaf for path, leaf in total.items()}

    def debiased(self) -> Tree:
        """(x_t - prod(b) x_0) / sum_j c_j: the weighted mean of the statistics, free of the initial value."""
        total = weighted_sum(ema_weights(self.decays), self.history)
        return {path: leaf / self.weight for path, leaf in total.items()}
