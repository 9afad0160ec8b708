"""What Adam's moments tell: the signal in the gradients, how near the bound is, every coordinate's own rate.

Moments are found by path in all states of `scale_by_adam`, so that groups by path, masks and wrappers do not
matter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._precision import abs_square, scale
from adaptive_optax._states import states_of
from adaptive_optax.moments.formats import dense
from adaptive_optax.transforms.adam import ScaleByAdamState

_LOWEST, BINS = -33, 40  # octaves
HISTOGRAM_EDGES = 2.0 ** np.arange(_LOWEST, _LOWEST + BINS + 1)

_LEAST_NOISE = 1e-4  # of 1 - 1/n_eff, below which m holds one gradient and tells nothing


class Statistics(NamedTuple):
    """Values, or whether they are defined: one each or, but for their bins, one a tensor."""

    snr: jax.Array
    bound_utilisation: jax.Array
    histogram: jax.Array


class _Leaf(NamedTuple):
    """What is taken of one leaf.

    Attributes:
        size: The number of coordinates.
        second: Mean of v-hat; sums would overflow sooner.
        noise: Mean of the estimated variance.
        is_noise: Whether that estimate is defined.
        is_own: Whether v-hat is the leaf's own.
        longest: The square of the direction over its bound, where it is longest.
        counts: Coordinates in each bin.
    """

    size: float
    second: jax.Array
    noise: jax.Array
    is_noise: jax.Array
    is_own: bool
    longest: jax.Array
    counts: jax.Array


class AdamStatistics(NamedTuple):
    """What is taken of every leaf, None for one that is not Adam's."""

    leaves: list[_Leaf | None]
    dtype: Any

    def pooled(self, per_tensor: bool) -> tuple[Statistics, Statistics]:
        """The statistics of each leaf, or of all, and whether they are defined."""
        if per_tensor:
            each = [self._of([leaf]) for leaf in self.leaves]
            if not each:
                return _undefined(self.dtype, (0,))
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
            return stacked[0], stacked[1]
        return self._of(self.leaves)

    def _of(self, leaves: list[_Leaf | None]) -> tuple[Statistics, Statistics]:
        known = [leaf for leaf in leaves if leaf is not None]
        if not known or len(known) < len(leaves):
            return _undefined(self.dtype, ())
        whole = max(sum(leaf.size for leaf in known), 1.0)
        total = sum(leaf.second * (leaf.size / whole) for leaf in known)
        noise = sum(leaf.noise * (leaf.size / whole) for leaf in known)
        counts = sum(leaf.counts for leaf in known)
        values = Statistics(
            # 0 / 0 = 0: without gradients there is no signal.
            snr=jnp.where(total == 0, 0, jnp.clip(1 - noise / jnp.where(total == 0, 1, total), 0, 1)),
            bound_utilisation=jnp.sqrt(jnp.max(jnp.stack([leaf.longest for leaf in known]))),
            # A NaN has a place among the bins, but no meaning.
            histogram=jnp.where(jnp.isnan(total), total, counts / jnp.maximum(jnp.sum(counts), 1)),
        )
        own = len(leaves) > 1 or known[0].is_own
        is_noise = jnp.all(jnp.stack([leaf.is_noise for leaf in known])) & own
        defined = Statistics(is_noise, jnp.ones((), jnp.bool_), jnp.ones((), jnp.bool_))
        return Statistics(*(x.astype(self.dtype) for x in values)), defined


def _undefined(dtype: Any, shape: tuple[int, ...]) -> tuple[Statistics, Statistics]:
    values = Statistics(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, BINS), dtype))
    return values, Statistics(*(jnp.zeros(shape, jnp.bool_) for _ in range(3)))


def adam_statistics(paths: list[str], opt_state: Any, rate: jax.Array, dtype: Any) -> AdamStatistics:
    """Takes from the states of `scale_by_adam` what they hold of the leaves at these paths.

    Args:
        paths: The paths of the gradient's leaves.
        opt_state: A state with any number of `ScaleByAdamState` in it, after the step.
        rate: The learning rate.
        dtype: The dtype of the statistics.
    """
    found: dict[str, _Leaf] = {}
    for state in states_of(ScaleByAdamState, opt_state):
        found |= _leaves_of(state, rate, dtype)
    return AdamStatistics([found.get(path) for path in paths], dtype)


def _leaves_of(state: ScaleByAdamState, rate: jax.Array, dtype: Any) -> dict[str, _Leaf]:
    first = dict(paths_and_leaves(dense(state.mu)))
    second, largest = (dict(paths_and_leaves(dense(moment))) for moment in (state.nu, state.nu_max))
    is_shared = second.keys() != first.keys()
    if is_shared:  # by all, or by labels, of which the state does not tell the leaves
        values = list(second.values())
        if len(values) != 1 or values[0].ndim:
            return {}
        second, largest = (
            {path: x for x in moment.values() for path in first} for moment in (second, largest)
        )
    w1, w2, b1, eps, bound_sq = (
        x.astype(dtype) for x in (state.mu_weight, state.nu_weight, state.b1, state.eps, state.bound_sq)
    )
    bound_sq = bound_sq * w2 / jnp.square(w1)
    one_over_n = (1 - b1) / (1 + b1) * (2 - w1) / w1  # of the variance is left in that of m-hat
    is_noise = 1 - one_over_n > _LEAST_NOISE
    found = {}
    for path, m in first.items():
        m, v = scale(m, 1 / w1), scale(second[path], 1 / w2)
        times = m.size / max(v.size, 1)  # coordinates a value
        total = jnp.sum(v / max(v.size, 1))
        mean_sq = jnp.sum(abs_square(m) / max(m.size, 1))
        used = largest.get(path)  # amsgrad's, which is corrected already
        used = v if used is None else used
        root = jnp.sqrt(used) + eps.astype(v.dtype)
        lengths = _group_means(jnp.where(root == 0, 0, abs_square(m) / jnp.square(root)), v.shape)
        found[path] = _Leaf(
            size=float(m.size),
            second=total.astype(dtype),
            noise=(total - mean_sq).astype(dtype) / jnp.where(is_noise, 1 - one_over_n, 1),
            is_noise=is_noise,
            is_own=not is_shared or len(first) == 1,
            longest=jnp.max(lengths, initial=0).astype(dtype) / bound_sq,
            counts=_counts(rate.astype(v.dtype) / root).astype(dtype) * times,
        )
    if is_shared:  # the leaves are one group
        whole = max(sum(leaf.size for leaf in found.values()), 1.0)
        longest = sum(leaf.longest * (leaf.size / whole) for leaf in found.values())
        found = {path: leaf._replace(longest=longest) for path, leaf in found.items()}
    return found


def _group_means(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The means over what shares one of `shape` values, which broadcasts to x."""
    aligned = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis in range(x.ndim) if aligned[axis] != x.shape[axis])
    return jnp.sum(x, axis=axes) / max(1, math.prod(x.shape[axis] for axis in axes))


def _counts(rates: jax.Array) -> jax.Array:
    """The number of rates in each octave; a float's exponent is its octave."""
    bits = jax.lax.bitcast_convert_type(rates.astype(jnp.float32), jnp.int32)
    octaves = (bits >> 23) - 127
    index = jnp.clip(octaves - _LOWEST, 0, BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[jnp.ravel(index)].add(1)
