"""Low-precision parameters rounded from float32 copies; `transforms/stochastic_rounding.py` compares."""

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


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
        inner_state: State of the inner transformation, for float32 parameters.
        master: float32 copies of the low-precision parameters; a scalar 0 for float32 and wider.
    """

    inner_state: OptState
    master: Params


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
        The transformation; `update` needs `params`.

    Raises:
        ValueError: If `inner` is not a transformation (at construction), a leaf is not floating or has 8 bits
            (at init), or `params` is missing (at update).

    State cost: the state of `inner`, and 4 bytes per low-precision parameter.

    Examples:
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
        return MasterWeightsState(None, for_low_precision("master_weights", params, in_float32))

    def init_fn(params):
        state = own_init(params)
        return state._replace(inner_state=inner.init(_float32_copy((), params, state.master)))

    def update_fn(updates, state, params=None, **extra_args):
        check_params("master_weights", params)
        check_same_tree("master_weights", "updates", updates, "params", params)
        if isinstance(state, MasterWeightsState):
            check_still_low("master_weights", params, state.master)
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
    return jnp.where(round_to_nearest(master, p.dtype) == in_float32(p), master, in_float32(p))


@by_leaf(like=("u", "old"))
def _step_master(
    _: Any, u: jax.Array, old: jax.Array, p: jax.Array, copy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    if not is_low_precision(p):
        return u, old
    master = copy + in_float32(u)
    return update_to_reach(p, round_to_nearest(master, p.dtype)), master
