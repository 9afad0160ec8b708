"""Statistics from Adam's moments: gradient signal, use of the bound, and learning rates per coordinate.

Moments are found by path in all states of `scale_by_adam`, so it works with groups by path, masks and
wrappers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import abs_square
from adaptive_optax._core.sharding import replicated_like
from adaptive_optax._core.states import children, states_of
from adaptive_optax._core.trees import PyTree
from adaptive_optax.hyperparams import learning_rates
from adaptive_optax.moments.granularity import is_own_statistic, mean_over_groups
from adaptive_optax.transforms.adam import ScaleByAdamState, direction_parts
from adaptive_optax.transforms.adam_bound import corrected_bound_sq

_LOWEST, BINS = -33, 40  # octaves
HISTOGRAM_EDGES = 2.0 ** np.arange(_LOWEST, _LOWEST + BINS + 1)

_LEAST_NOISE = 1e-4  # for 1 - 1/n_eff; below it m is a single gradient and says nothing about noise


class Statistics(NamedTuple):
    """Values, or whether they are defined: one of each (except for bins), or one of each per tensor."""

    snr: jax.Array
    bound_utilisation: jax.Array
    histogram: jax.Array


class _Leaf(NamedTuple):
    """The raw statistics of one leaf, or of several leaves together.

    Attributes:
        size: The number of coordinates.
        second: Mean of v-hat; a sum would overflow sooner.
        noise: Mean of the estimated variance.
        longest: The largest square of the direction divided by its bound.
        counts: The number of coordinates in each bin.
        is_noise: Whether `noise` is defined.
        is_stepped: Whether a step has been taken; before that nothing is defined.
        is_own: Whether v-hat belongs to this leaf alone.
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
    paths: list[str], opt_state: PyTree, rate_scale: jax.Array, dtype: Any, *, per_tensor: bool
) -> tuple[Statistics, Statistics]:
    """Returns the statistics of each leaf, or of all leaves together, and whether they are defined.

    Args:
        paths: The paths of the gradient's leaves.
        opt_state: A state after the step, with any number of `ScaleByAdamState`.
        rate_scale: A factor on learning rates.
        dtype: The dtype of the statistics.
        per_tensor: Whether to return them for each leaf.
    """
    found: dict[str, _Leaf] = {}
    for state, rate in _with_rates(opt_state):
        found |= _leaves_of(state, None if rate is None else rate.astype(dtype) * rate_scale, dtype)
    leaves = [found.get(path) for path in paths]
    return _each(leaves, dtype) if per_tensor else _pooled(leaves, dtype)


def _with_rates(node: Any) -> list[tuple[ScaleByAdamState, jax.Array | None]]:
    """Each Adam state with the learning rate of its group, or None if there is not exactly one."""
    states = states_of(ScaleByAdamState, node)
    rates = learning_rates(node) if states else []
    if len(rates) <= 1 or isinstance(node, ScaleByAdamState):
        return [(state, rates[0] if rates else None) for state in states]
    return [found for _, child in children(node) for found in _with_rates(child)]


def _pooled(leaves: list[_Leaf | None], dtype: Any) -> tuple[Statistics, Statistics]:
    """The statistics of all leaves together."""
    known = [leaf for leaf in leaves if leaf is not None]
    if not known or len(known) < len(leaves):
        return _undefined(dtype, ())
    whole, zero = max(sum(leaf.size for leaf in known), 1.0), jnp.zeros((), dtype)
    return _as_statistics(
        _Leaf(
            size=whole,
            second=sum((leaf.second * (leaf.size / whole) for leaf in known), start=zero),
            noise=sum((leaf.noise * (leaf.size / whole) for leaf in known), start=zero),
            longest=jnp.max(jnp.stack([leaf.longest for leaf in known])),
            counts=sum((leaf.counts for leaf in known), start=zero),
            is_noise=jnp.all(jnp.stack([leaf.is_noise for leaf in known])),
            is_stepped=jnp.all(jnp.stack([leaf.is_stepped for leaf in known])),
            is_own=len(leaves) > 1 or known[0].is_own,
            is_rated=all(leaf.is_rated for leaf in known),
        )
    )


def _each(leaves: list[_Leaf | None], dtype: Any) -> tuple[Statistics, Statistics]:
    """The statistics of every leaf, computed in one array because hundreds of scalars compile slowly."""
    if not leaves:
        return _undefined(dtype, (0,))
    zero, no = jnp.zeros((), dtype), jnp.zeros((), jnp.bool_)
    unknown = _Leaf(0.0, zero, zero, zero, jnp.zeros(BINS, dtype), no, no, False, False)
    return _as_statistics(_Leaf(*map(_stacked, zip(*(leaf or unknown for leaf in leaves), strict=True))))


def _stacked(values: tuple[Any, ...]) -> Any:
    return jnp.stack(values) if any(isinstance(x, jax.Array) for x in values) else np.array(values)


def _as_statistics(leaf: _Leaf) -> tuple[Statistics, Statistics]:
    """Computes the statistics from the raw ones of a leaf, or of leaves on a leading axis."""
    total = leaf.second
    # A NaN falls into some bin, but means nothing there.
    spoiled = jnp.expand_dims(jnp.isnan(total), -1)
    shares = leaf.counts / jnp.maximum(jnp.sum(leaf.counts, axis=-1, keepdims=True), 1)
    # Without gradients there is no signal, and none is left beside a second moment that has overflowed.
    has_signal = (total != 0) & ~jnp.isinf(total)
    values = Statistics(
        snr=jnp.where(has_signal, jnp.clip(1 - leaf.noise / jnp.where(has_signal, total, 1), 0, 1), 0),
        bound_utilisation=jnp.sqrt(leaf.longest),
        histogram=jnp.where(spoiled, jnp.expand_dims(total, -1), shares),
    )
    defined = Statistics(
        snr=leaf.is_stepped & leaf.is_noise & leaf.is_own,
        bound_utilisation=leaf.is_stepped,
        histogram=leaf.is_stepped & leaf.is_rated,
    )
    return values, defined


def _undefined(dtype: Any, shape: tuple[int, ...]) -> tuple[Statistics, Statistics]:
    values = Statistics(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((*shape, BINS), dtype))
    return values, Statistics(*(jnp.zeros(shape, jnp.bool_) for _ in range(3)))


def _leaves_of(state: ScaleByAdamState, rate: jax.Array | None, dtype: Any) -> dict[str, _Leaf]:
    mu_hat, nu_hat, roots = (dict(paths_and_leaves(part)) for part in direction_parts(state))
    is_shared = nu_hat.keys() != mu_hat.keys()
    if is_shared:  # by all leaves, or by labels, whose leaves the state does not reveal
        values = list(nu_hat.values())
        if len(values) != 1 or values[0].ndim:
            return {}
        nu_hat, roots = ({path: x for x in part.values() for path in mu_hat} for part in (nu_hat, roots))
    w1, w2, b1, bound_sq = (
        x.astype(dtype) for x in (state.mu_weight, state.nu_weight, state.b1, state.bound_sq)
    )
    is_stepped = w1 > 0
    w1, w2, bound_sq = (jnp.where(is_stepped, x, 1) for x in (w1, w2, bound_sq))
    bound_sq = corrected_bound_sq(bound_sq, w1, w2)
    one_over_n = (1 - b1) / (1 + b1) * (2 - w1) / w1  # the variance of m-hat as a fraction of the gradient's
    is_noise = 1 - one_over_n > _LEAST_NOISE
    found = {}
    for path, m in mu_hat.items():
        v, root = nu_hat[path], roots[path]
        if not is_own_statistic(v.shape, m.shape):
            continue  # a granularity with its own `spread`, which the state does not reveal
        total = jnp.sum(v / max(v.size, 1))
        mean_sq = jnp.sum(abs_square(m / math.sqrt(max(m.size, 1))))
        # Beside a root whose square overflows, the length counts as 0.
        square = jnp.square(root)
        is_defined = (root != 0) & ~jnp.isinf(square)
        lengths = mean_over_groups(jnp.where(is_defined, abs_square(m) / square, 0), v.shape)
        rates = (jnp.zeros((), dtype) if rate is None else rate).astype(v.dtype) / root
        found[path] = _Leaf(
            size=float(m.size),
            second=total.astype(dtype),
            noise=jnp.where(jnp.isinf(total), 0, total - mean_sq).astype(dtype)
            / jnp.where(is_noise, 1 - one_over_n, 1),
            longest=jnp.max(lengths, initial=0).astype(dtype) / bound_sq,
            counts=_counts(rates).astype(dtype) * (m.size / max(v.size, 1)),  # coordinates per value
            is_noise=is_noise,
            is_stepped=is_stepped,
            is_own=not is_shared or len(mu_hat) == 1,
            is_rated=rate is not None,
        )
    if is_shared:  # the leaves form one group
        whole = max(sum(leaf.size for leaf in found.values()), 1.0)
        longest = sum(leaf.longest * (leaf.size / whole) for leaf in found.values())
        found = {path: leaf._replace(longest=longest) for path, leaf in found.items()}
    return found


def _counts(rates: jax.Array) -> jax.Array:
    """The number of rates in each octave, which is the exponent of the float."""
    bits = jax.lax.bitcast_convert_type(rates.astype(jnp.float32), jnp.int32)
    octaves = (bits >> 23) - 127
    index = jnp.clip(octaves - _LOWEST, 0, BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[index].add(1, out_sharding=replicated_like(index))
