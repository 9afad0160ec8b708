r"""Low-precision parameters done right: three ways to keep what `optax.apply_updates` rounds away.

`apply_updates` adds in float32 and rounds to the parameter's dtype, to nearest. In bfloat16, with 8 bits, a
step of less than 1/512 of a parameter changes nothing: 1.0 plus a thousand times 0.001 stays 1.0. Each of the
transformations here computes the new parameter q itself, rounds it as it means to, and hands out q - p, which
lands on q whatever applies it.

=======================  ==================================  =====================  ========================
                         keeps                               extra state            good for
=======================  ==================================  =====================  ========================
`stochastic_rounding`    the step, in expectation            none                   most; adds noise
`kahan_summation`        about 16 bits                       2 bytes a parameter    steps above 2^-16 of p
`master_weights`         float32's 24 bits                   4 bytes a parameter    everything
=======================  ==================================  =====================  ========================

Leaves of float32 and wider pass through all three as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._checks import (
    check_inexact,
    check_integer,
    check_params,
    check_same_tree,
    check_state,
    check_transformation,
)
from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._precision import incremented, widen
from adaptive_optax._rounding import is_low_precision, random_bits, round_stochastically, round_to_nearest
from adaptive_optax._trees import by_leaf, leaf_numbers


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        count: Number of steps taken, int32 scalar.
    """

    count: jax.Array


def stochastic_rounding(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Rounds the new low-precision parameters up or down at random, right in expectation.

    The last link of a chain. Use it first when parameters are bfloat16 or float16: it costs no memory. A sum
    x = p + u between the neighbours a < b becomes b with probability (x - a) / (b - a). The noise is at most
    half a unit in the last place (standard deviation), and each step's is its own.

    Args:
        seed: Of the random bits, an integer in [0, 2^32). They are a hash of it, of the coordinate, the step
            and the leaf: a restored run goes on bit for bit, and any sharding draws the same.

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
        >>> for _ in range(10):  # to nearest, every one of these steps would be lost
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
        check_state("stochastic_rounding", state, StochasticRoundingState)
        check_params("stochastic_rounding", params)
        check_same_tree("stochastic_rounding", "updates", updates, "params", params)

        updates = widen(updates)
        (updates,) = _step_rounded((state.count, seed), updates, params, leaf_numbers(updates))
        return updates, StochasticRoundingState(incremented(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@by_leaf(results=1)
def _step_rounded(step: tuple[jax.Array, int], u: jax.Array, p: jax.Array, number: Any) -> tuple[jax.Array]:
    count, seed = step
    if not is_low_precision(p):
        return (u,)
    bits = random_bits(p.shape, count, number, "parameter", seed)
    return (_landing(p, round_stochastically(_wide(p) + _wide(u), p.dtype, bits)),)


class KahanSummationState(NamedTuple):
    """State of `kahan_summation`.

    Attributes:
        inner_state: The inner transformation's.
        compensation: What the parameters lack, in their dtypes; a scalar 0 for float32 and wider.
    """

    inner_state: Any
    compensation: Any


def kahan_summation(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Carries what rounding took off a low-precision parameter over to the next step.

    Use it where the noise of `stochastic_rounding` hurts and master weights are too large. With :math:`\circ`
    for rounding to the parameter's dtype, to nearest, and u the inner update:

    .. math::
        y = u + c, \qquad p' = \circ(p + y), \qquad c' = \circ((p - p') + y)

    The pair holds about twice the parameter's digits, 16 bits for bfloat16: a step below :math:`2^{-16} |p|`
    is rounded with a bias. For such steps use `master_weights`.

    Args:
        inner: The transformation whose updates are to be kept, a whole optimizer.

    Returns:
        The transformation; `update` needs `params`. Extra arguments go to `inner`.

    Raises:
        ValueError: If `inner` is no transformation (at construction), a leaf is not floating or has 8 bits
            (at init), or `params` is missing (at update).

    State cost: that of `inner`, and 2 bytes a low-precision parameter.

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
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        _check_params("kahan_summation", params)
        compensation = jax.tree.map(
            lambda p: jnp.zeros_like(p) if is_low_precision(p) else jnp.zeros((), p.dtype), params
        )
        return KahanSummationState(inner.init(params), compensation)

    def update_fn(updates, state, params=None, **extra_args):
        check_state("kahan_summation", state, KahanSummationState)
        check_params("kahan_summation", params)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        check_same_tree("kahan_summation", "updates", updates, "params", params)

        updates, compensation = _step_compensated((), widen(updates), state.compensation, params)
        return updates, KahanSummationState(inner_state, compensation)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@by_leaf(results=2)
def _step_compensated(_: Any, u: jax.Array, c: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    if not is_low_precision(p):
        return u, c
    step = _wide(u) + _wide(c)
    target = round_to_nearest(_wide(p) + step, p.dtype)
    lacking = round_to_nearest((_wide(p) - target) + step, p.dtype)
    return _landing(p, target), lacking.astype(p.dtype)


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
        inner_state: The inner transformation's, for float32 parameters.
        master: float32 copies of the low-precision parameters; a scalar 0 for float32 and wider.
    """

    inner_state: Any
    master: Any


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Keeps float32 copies of low-precision parameters, and hands the parameters what these round to.

    Use it where memory allows: the run is that of float32 parameters, seen through low-precision ones in the
    loss alone. `inner` sees the copies as its `params` and float32 gradients, so optimizers of optax keep
    float32 state too.

    A copy that no longer rounds to its parameter, because that was clipped, reloaded or otherwise changed
    from outside, is taken anew from it, coordinate by coordinate.

    Args:
        inner: The transformation that trains the copies, a whole optimizer.

    Returns:
        The transformation; `update` needs `params`. Extra arguments go to `inner`.

    Raises:
        ValueError: If `inner` is no transformation (at construction), a leaf is not floating or has 8 bits
            (at init), or `params` is missing (at update).

    State cost: that of `inner`, and 4 bytes a low-precision parameter.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.master_weights(optax.adamw(1e-4))
        >>> params = jnp.ones(1, jnp.bfloat16)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.ones(1, jnp.bfloat16), state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> params.tolist(), bool(state.master[0] < 1)  # too small a step to be seen, but not lost
        ([1.0], True)

    Source: Micikevicius et al. 2018, "Mixed precision training", section 3.1.
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        _check_params("master_weights", params)
        master = jax.tree.map(lambda p: _wide(p) if is_low_precision(p) else jnp.zeros((), p.dtype), params)
        return MasterWeightsState(inner.init(_seen((), params, master)[0]), master)

    def update_fn(updates, state, params=None, **extra_args):
        check_state("master_weights", state, MasterWeightsState)
        check_params("master_weights", params)
        check_same_tree("master_weights", "updates", updates, "params", params)
        (copies,) = _seen((), params, state.master)
        updates, inner_state = inner.update(widen(updates), state.inner_state, copies, **extra_args)

        updates, master = _step_master((), widen(updates), state.master, params, copies)
        return updates, MasterWeightsState(inner_state, master)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@by_leaf(results=1)
def _seen(_: Any, p: jax.Array, master: jax.Array) -> tuple[jax.Array]:
    """The copy of a parameter: of itself where it is wide, or changed from outside."""
    if not is_low_precision(p):
        return (p,)
    return (jnp.where(round_to_nearest(master, p.dtype) == _wide(p), master, _wide(p)),)


@by_leaf(results=2)
def _step_master(
    _: Any, u: jax.Array, old: jax.Array, p: jax.Array, copy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if not is_low_precision(p):
        return u, old
    master = copy + _wide(u)
    return _landing(p, round_to_nearest(master, p.dtype)), master


def _wide(p: jax.Array) -> jax.Array:
    return p.astype(jnp.float32)


def _landing(p: jax.Array, target: jax.Array) -> jax.Array:
    """The float32 update with which p + update rounds to `target`, which p's dtype holds.

    target - p is exact where the two are of like size. Where target is far larger, an error of 2^-24 of it
    is far below half a unit of p's dtype. Where it is far smaller, it is a sum of float32 numbers as large as
    p, hence a multiple of their unit, and the difference is exact again.
    """
    return target - _wide(p)


def _check_params(owner: str, params: Any) -> None:
    check_inexact(owner, "params", params)
    for path, p in paths_and_leaves(params):
        if is_low_precision(p) and jnp.finfo(p.dtype).bits < 16:
            raise ValueError(f"{owner}: {path!r} is {p.dtype}; bfloat16, float16 or wider is needed.")
