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
from adaptive_optax.control.hyperparams import learning_rates
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
        longest: The square of the direction over its bound, where it is longest.
        counts: Coordinates in each bin.
        is_noise: Whether `noise` is defined.
        is_stepped: Whether there was a step; before it nothing is defined.
        is_own: Whether v-hat is the leaf's own.
        is_rated: Whether its learning rate is known.
    """

    size: float
    second: jax.Array
    noise: jax.Array
    longest: jax.Array
    counts: jax.Array
    is_noise: jax.Array
    is_stepped: jax.Array
    is_own: bool
    is_rated: bool


def adam_statistics(
    paths: list[str], opt_state: Any, rate_scale: jax.Array, dtype: Any, *, per_tensor: bool
) -> tuple[Statistics, Statistics]:
    """Gives the statistics of each leaf, or of all, and whether they are defined.

    Args:
        paths: The paths of the gradient's leaves.
        opt_state: A state with any number of `ScaleByAdamState` in it, after the step.
        rate_scale: A factor on learning rates.
        dtype: The dtype of the statistics.
        per_tensor: Whether to give them for each leaf.
    """
    found: dict[str, _Leaf] = {}
    for state, rate in _with_rates(opt_state):
        found |= _leaves_of(state, None if rate is None else rate.astype(dtype) * rate_scale, dtype)
    leaves = [found.get(path) for path in paths]
    if not per_tensor:
        return _pooled(leaves, dtype)
    each = [_pooled([leaf], dtype) for leaf in leaves]
    return jax.tree.map(lambda *x: jnp.stack(x), *each) if each else _undefined(dtype, (0,))


def _with_rates(node: Any) -> list[tuple[ScaleByAdamState, jax.Array | None]]:
    """Each state of Adam with the learning rate of the group that it is in; None where that is not one."""
    states = states_of(ScaleByAdamState, node)
    rates = learning_rates(node) if states else []
    if len(rates) <= 1 or isinstance(node, ScaleByAdamState):
        return [(state, rates[0] if rates else None) for state in states]
    children = node.values() if isinstance(node, dict) else node
    return [found for child in children for found in _with_rates(child)]


def _pooled(leaves: list[_Leaf | None], dtype: Any) -> tuple[Statistics, Statistics]:
    known = [leaf for leaf in leaves if leaf is not None]
    if not known or len(known) < len(leaves):
        return _undefined(dtype, ())
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
    is_stepped = jnp.all(jnp.stack([leaf.is_stepped for leaf in known]))
    is_noise = jnp.all(jnp.stack([leaf.is_noise for leaf in known]))
    is_own = len(leaves) > 1 or known[0].is_own
    defined = Statistics(
        snr=is_stepped & is_noise & is_own,
        bound_utilisation=is_stepped,
        histogram=is_stepped & all(leaf.is_rated for leaf in known),
    )
    return Statistics(*(x.astype(dtype) for x in values)), defined


def _undefined(dtype: Any, shape: tuple[int, ...]) -> tuple[Statistics, Statistics]:
    values = Statistics(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, BINS), dtype))
    return values, Statistics(*(jnp.zeros(shape, jnp.bool_) for _ in range(3)))


def _leaves_of(state: ScaleByAdamState, rate: jax.Array | None, dtype: Any) -> dict[str, _Leaf]:
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
    is_stepped = w1 > 0
    w1, w2, bound_sq = (jnp.where(is_stepped, x, 1) for x in (w1, w2, bound_sq))
    bound_sq = bound_sq * w2 / jnp.square(w1)
    one_over_n = (1 - b1) / (1 + b1) * (2 - w1) / w1  # of the variance is left in that of m-hat
    is_noise = 1 - one_over_n > _LEAST_NOISE
    found = {}
    for path, m in first.items():
        m, v = scale(m, 1 / w1), scale(second[path], 1 / w2)
        total = jnp.sum(v / max(v.size, 1))
        mean_sq = jnp.sum(abs_square(m) / max(m.size, 1))
        used = largest.get(path)  # amsgrad's, which is corrected already
        used = v if used is None else used
        root = jnp.sqrt(used) + eps.astype(v.dtype)
        lengths = _group_means(jnp.where(root == 0, 0, abs_square(m) / jnp.square(root)), v.shape)
        rates = (jnp.zeros((), dtype) if rate is None else rate).astype(v.dtype) / root
        found[path] = _Leaf(
            size=float(m.size),
            second=total.astype(dtype),
            noise=(total - mean_sq).astype(dtype) / jnp.where(is_noise, 1 - one_over_n, 1),
            longest=jnp.max(lengths, initial=0).astype(dtype) / bound_sq,
            counts=_counts(rates).astype(dtype) * (m.size / max(v.size, 1)),  # coordinates a value
            is_noise=is_noise,
            is_stepped=is_stepped,
            is_own=not is_shared or len(first) == 1,
            is_rated=rate is not None,
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
