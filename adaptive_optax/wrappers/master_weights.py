r"""Low-precision parameters done right: three ways to keep what `optax.apply_updates` rounds away.

`apply_updates` adds in float32 and rounds to the nearest value of the parameter's dtype. In bfloat16, with 8
bits, a step of less than 1/512 of a parameter has no effect: 1.0 plus a thousand times 0.001 stays 1.0. Each
transformation here computes the new parameter q itself, rounds it in its own way, and returns q - p as the
update, so that applying it gives exactly q.

=======================  ==================================  =====================  ========================
                         keeps                               extra state            good for
=======================  ==================================  =====================  ========================
`stochastic_rounding`    the step, in expectation            none                   most; adds noise
`kahan_summation`        about 16 bits                       2 bytes per parameter  steps above 2^-16 of p
`master_weights`         float32's 24 bits                   4 bytes per parameter  everything
=======================  ==================================  =====================  ========================

All three leave float32 and wider leaves unchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import (
    check_integer,
    check_params,
    check_same_tree,
    check_state,
    check_transformation,
)
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import incremented, widen
from adaptive_optax._core.random_bits import (
    is_low_precision,
    random_bits,
    round_stochastically,
    round_to_nearest,
)
from adaptive_optax._core.sharding import traced_sharding
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import PyTree, by_leaf, leaf_numbers


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        count: Number of steps taken, int32 scalar.
    """

    count: jax.Array


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Rounds the new low-precision parameters up or down at random, so that they are right in expectation.

    Put it last in a chain. It is the first thing to try for bfloat16 or float16 parameters, since it costs no
    memory. A sum x = p + u between the neighbours a < b becomes b with probability (x - a) / (b - a). The
    standard deviation of the noise is at most half a unit in the last place, and the noise of different steps
    is independent. A NaN or a huge update passes through and has no lasting effect.

    Args:
        seed: The seed of the random bits, an integer in [0, 2^32). The bits are a hash of the seed, the
            coordinate, the step and the leaf: a restored run continues bit for bit, and the bits are the same
            under any sharding.

    Returns:
        The transformation; `update` needs `params`. Extra arguments are ignored.

    Raises:
        ValueError: If `seed` is out of range (at construction), a leaf is not floating or has 8 bits (at
            init), or `params` is missing (at update).

    State cost: one counter.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.sgd(1.0), ao.stochastic_rounding())
        >>> params = jnp.ones(1000, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(10):  # rounding to nearest would lose each of these steps
        ...     updates, state = tx.update(jnp.full(1000, -1e-3), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(abs(params.astype(jnp.float32).mean() - 1.01) < 1e-3)
        True

    Source: Gupta et al. 2015, "Deep learning with limited numerical precision", section 3; for bfloat16
    training Zamirai et al. 2020, "Revisiting BFloat16 training", section 4.
    """
    check_integer("seed", seed, "[0, 4294967295]")

    def init_fn(params):
        _check_params("stochastic_rounding", params)
        return StochasticRoundingState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params("stochastic_rounding", params)
        check_same_tree("stochastic_rounding", "updates", updates, "params", params)
        check_state("stochastic_rounding", state, init_fn, "params", params)

        updates = widen(updates)
        updates = _step_rounded((state.count, seed), updates, params, leaf_numbers(updates))
        return updates, StochasticRoundingState(incremented(state.count))

    return transformation("stochastic_rounding", init_fn, update_fn)


@by_leaf(like="u")
def _step_rounded(step: tuple[jax.Array, int], u: jax.Array, p: jax.Array, number: Any) -> jax.Array:
    count, seed = step
    if not is_low_precision(p):
        return u
    bits = random_bits(p.shape, count, number, "parameter", seed, sharding=traced_sharding(p))
    return _update_to_reach(p, round_stochastically(_wide(p) + _wide(u), p.dtype, bits))


class KahanSummationState(NamedTuple):
    """State of `kahan_summation`.

    Attributes:
        inner_state: State of the inner transformation.
        compensation: The rounding errors of the parameters, in their dtypes; a scalar 0 for float32 and
            wider.
    """

    inner_state: PyTree
    compensation: PyTree


def kahan_summation(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Carries the rounding error of each low-precision parameter over to the next step.

    Use it if the noise of `stochastic_rounding` hurts and master weights are too large. With :math:`\circ`
    for rounding to the nearest value of the parameter's dtype, and u the inner update:

    .. math::
        y = u + c, \qquad p' = \circ(p + y), \qquad c' = \circ((p - p') + y)

    The pair (p, c) has about twice the parameter's precision, 16 bits for bfloat16. A step below
    :math:`2^{-16} |p|` is rounded with a bias; use `master_weights` for such steps. A NaN in the update stays
    in c for good.

    Args:
        inner: The transformation whose updates to compensate, usually a whole optimizer.

    Returns:
        The transformation; `update` needs `params`. Extra arguments are forwarded to `inner`.

    Raises:
        ValueError: If `inner` is not a transformation (at construction), a leaf is not floating or has 8 bits
            (at init), or `params` is missing (at update).

    State cost: the state of `inner`, and 2 bytes per low-precision parameter.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.kahan_summation(ao.sgd(1.0))
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(1000):
        ...     updates, state = tx.update(jnp.full(1, -1e-3), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params.tolist()
        [2.0]

    Source: Kahan 1965, "Further remarks on reducing truncation errors"; for bfloat16 training Zamirai et al.
    2020, algorithm 1.
    """
    check_transformation("inner", inner)
    inner = with_array_state(inner)

    def own_init(params):
        _check_params("kahan_summation", params)
        compensation = jax.tree.map(
            lambda p: jnp.zeros_like(p) if is_low_precision(p) else jnp.zeros((), p.dtype), params
        )
        return KahanSummationState(None, compensation)

    def init_fn(params):
        return own_init(params)._replace(inner_state=inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        check_params("kahan_summation", params)
        if isinstance(state, KahanSummationState):
            low = {path for path, c in paths_and_leaves(state.compensation) if is_low_precision(c)}
            _check_still_low("kahan_summation", params, low)
        check_state("kahan_summation", state, own_init, "params", params)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        check_same_tree("kahan_summation", "updates", updates, "params", params)

        updates, compensation = _step_compensated((), widen(updates), state.compensation, params)
        return updates, KahanSummationState(inner_state, compensation)

    return transformation("kahan_summation", init_fn, update_fn)


@by_leaf(like=("u", "c"))
def _step_compensated(_: Any, u: jax.Array, c: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    if not is_low_precision(p):
        return u, c
    step = _wide(u) + _wide(c)
    target = round_to_nearest(_wide(p) + step, p.dtype)
    lacking = round_to_nearest((_wide(p) - target) + step, p.dtype)
    return _update_to_reach(p, target), lacking.astype(p.dtype)


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
        inner_state: State of the inner transformation, for float32 parameters.
        master: float32 copies of the low-precision parameters; a scalar 0 for float32 and wider.
    """

    inner_state: PyTree
    master: PyTree


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Keeps float32 copies of low-precision parameters, and sets the parameters to the rounded copies.

    Use it if memory allows: the run is the same as with float32 parameters, except that the loss sees them in
    low precision. `inner` receives the copies as `params`, and float32 gradients, so optax's optimizers keep
    float32 state as well.

    A NaN in the update stays in the copy, as it does in the parameter: wrap this in `reject_nonfinite`.

    If a copy no longer rounds to its parameter, because the parameter was clipped, reloaded or otherwise
    changed from outside, it is replaced by the parameter, coordinate by coordinate.

    Args:
        inner: The transformation that trains the copies, usually a whole optimizer.

    Returns:
        The transformation; `update` needs `params`. Extra arguments are forwarded to `inner`.

    Raises:
        ValueError: If `inner` is not a transformation (at construction), a leaf is not floating or has 8 bits
            (at init), or `params` is missing (at update).

    State cost: the state of `inner`, and 4 bytes per low-precision parameter.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.master_weights(optax.adamw(1e-4))
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.ones(1, jnp.bfloat16), state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> params.tolist(), bool(state.master[0] < 1)  # the step is too small to be visible, but not lost
        ([1.0], True)

    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.1.
    """
    check_transformation("inner", inner)
    inner = with_array_state(inner)

    def own_init(params):
        _check_params("master_weights", params)
        master = jax.tree.map(lambda p: _wide(p) if is_low_precision(p) else jnp.zeros((), p.dtype), params)
        return MasterWeightsState(None, master)

    def init_fn(params):
        state = own_init(params)
        return state._replace(inner_state=inner.init(_float32_copy((), params, state.master)))

    def update_fn(updates, state, params=None, **extra_args):
        check_params("master_weights", params)
        check_same_tree("master_weights", "updates", updates, "params", params)
        if isinstance(state, MasterWeightsState):
            copied = {path for path, m in paths_and_leaves(state.master) if jnp.ndim(m)}
            _check_still_low("master_weights", params, copied)
        check_state("master_weights", state, own_init, "params", params)
        copies = _float32_copy((), params, state.master)
        updates, inner_state = inner.update(widen(updates), state.inner_state, copies, **extra_args)

        updates, master = _step_master((), widen(updates), state.master, params, copies)
        return updates, MasterWeightsState(inner_state, master)

    return transformation("master_weights", init_fn, update_fn)


@by_leaf(like="p")
def _float32_copy(_: Any, p: jax.Array, master: jax.Array) -> jax.Array:
    """The copy of a parameter, or the parameter itself where it is wide or was changed from outside."""
    if not is_low_precision(p):
        return p
    return jnp.where(round_to_nearest(master, p.dtype) == _wide(p), master, _wide(p))


@by_leaf(like=("u", "old"))
def _step_master(
    _: Any, u: jax.Array, old: jax.Array, p: jax.Array, copy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if not is_low_precision(p):
        return u, old
    master = copy + _wide(u)
    return _update_to_reach(p, round_to_nearest(master, p.dtype)), master


def _wide(p: jax.Array) -> jax.Array:
    return p.astype(jnp.float32)


def _update_to_reach(p: jax.Array, target: jax.Array) -> jax.Array:
    """The float32 update for which p + update rounds to `target`, a value of p's dtype.

    target - p is exact if the two have similar magnitudes. If target is much larger, its relative error of
    2^-24 is far below half a unit of p's dtype. If it is much smaller, it is a sum of float32 numbers as
    large as p, hence a multiple of their unit, and the difference is exact again.
    """
    return target - _wide(p)


def _check_still_low(owner: str, params: Any, low: set[str]) -> None:
    """Raises if parameters had 16 bits when the state was made, and a sum without a cast has widened them."""
    for path, p in paths_and_leaves(params):
        if path in low and not is_low_precision(p):
            raise ValueError(
                f"{owner}: {path!r} is {p.dtype} but had 16 bits when the state was made. Was the update "
                "added without a cast, as in equinox.apply_updates? Use optax.apply_updates, or end the "
                "chain with match_parameter_dtype."
            )


def _check_params(owner: str, params: Any) -> None:
    for path, p in paths_and_leaves(params):
        if is_low_precision(p) and jnp.finfo(p.dtype).bits < 16:
            raise ValueError(f"{owner}: {path!r} must be bfloat16, float16 or wider, got {p.dtype}.")
