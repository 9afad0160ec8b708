"""Low-precision parameters with compensated sums; `transforms/stochastic_rounding.py` compares the ways."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import check_params, check_same_tree, check_transformation
from adaptive_optax._core.low_precision import (
    check_still_low,
    for_low_precision,
    in_float32,
    update_to_reach,
)
from adaptive_optax._core.precision import widen
from adaptive_optax._core.random_bits import is_low_precision, round_to_nearest
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import OptState, Params, by_leaf


class KahanSummationState(NamedTuple):
    """State of `kahan_summation`.

    Attributes:
        inner_state: State of the inner transformation.
        compensation: The rounding errors of the parameters, in their dtypes; a scalar 0 for float32 and
            wider.
    """

    inner_state: OptState
    compensation: Params


def kahan_summation(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Carries the rounding error of each low-precision parameter over to the next step.

    Use it if the noise of `stochastic_rounding` hurts and master weights are too large. With $\circ$
    for rounding to the nearest value of the parameter's dtype, and u the inner update:

    $$
    y = u + c, \qquad p' = \circ(p + y), \qquad c' = \circ((p - p') + y)
    $$

    The pair (p, c) has about twice the parameter's precision, 16 bits for bfloat16. A step below
    $2^{-16} |p|$ is rounded with a bias; use `master_weights` for such steps. A NaN in the update stays
    in c for good.

    Args:
        inner: The transformation whose updates to compensate, usually a whole optimizer.

    Returns:
        The transformation; `update` needs `params`.

    Raises:
        ValueError: If `inner` is not a transformation (at construction), a leaf is not floating or has 8 bits
            (at init), or `params` is missing (at update).

    State cost: the state of `inner`, and 2 bytes per low-precision parameter.

    Examples:
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
        return KahanSummationState(None, for_low_precision("kahan_summation", params, jnp.zeros_like))

    def init_fn(params):
        return own_init(params)._replace(inner_state=inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        check_params("kahan_summation", params)
        if isinstance(state, KahanSummationState):
            check_still_low("kahan_summation", params, state.compensation)
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
    step = in_float32(u) + in_float32(c)
    target = round_to_nearest(in_float32(p) + step, p.dtype)
    lacking = round_to_nearest((in_float32(p) - target) + step, p.dtype)
    return update_to_reach(p, target), lacking.astype(p.dtype)
